{{- define "training.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "training.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "training.labels" -}}
{{ include "training.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "training.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default (printf "%s-training" $.Chart.AppVersion) }}{{ end }}
{{- end }}
{{- end }}

{{- define "training.claim" -}}
{{- .Values.volume.claim | default (include "training.fullname" .) }}
{{- end }}

{{/* What every pod has but its containers. */}}
{{- define "training.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}{{ dict "name" . | list | toYaml | nindent 2 }}{{ end }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat (ternary .Values.gpu.tolerations list .Values.gpu.enabled) .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: work
    persistentVolumeClaim:
      claimName: {{ include "training.claim" . }}
  - name: config
    configMap:
      name: {{ include "training.fullname" . }}
  - name: cache
    emptyDir:
      sizeLimit: 20Gi
  - name: tmp
    emptyDir:
      sizeLimit: 20Gi
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ .Values.sharedMemory }}
{{- end }}

{{/* What every container has: dict "root" . "resources" of it "gpus" N. */}}
{{- define "training.container" -}}
image: {{ include "training.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
env:
  # PyTorch starts a thread for each core of the node; the pod may use only its share.
  - name: OMP_NUM_THREADS
    valueFrom:
      resourceFieldRef:
        resource: limits.cpu
  - name: HF_HUB_OFFLINE
    value: "1"
resources:
  requests: {{- toYaml .resources.requests | nindent 4 }}
  limits: {{- toYaml .resources.limits | nindent 4 }}
    {{- if and .root.Values.gpu.enabled .gpus }}
    {{ .root.Values.gpu.resource }}: {{ .gpus }}
    {{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: work
    mountPath: /work
  - name: config
    mountPath: /etc/turbolens/config
    readOnly: true
  - name: cache
    mountPath: /cache
  - name: tmp
    mountPath: /tmp
  - name: shm
    mountPath: /dev/shm
{{- end }}

{{/* A word of a command line, in quotes only where it needs them: not everything between here and a shell reads them. */}}
{{- define "training.word" -}}
{{ ternary . (squote .) (regexMatch "^[\\w./:=@%+,-]+$" .) }}
{{- end }}

{{/* Settings as flags. */}}
{{- define "training.flags" -}}
{{- range $name, $value := . }}
{{- $flag := replace "_" "-" $name }}
{{- if kindIs "bool" $value }} {{ ternary "--" "--no-" $value }}{{ $flag }}
{{- else if kindIs "slice" $value }} --{{ $flag }}{{ range $value }} {{ include "training.word" (toString .) }}{{ end }}
{{- else if kindIs "string" $value }} --{{ $flag }} {{ include "training.word" $value }}
{{- else }} --{{ $flag }} {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}

{{- define "training.check" -}}
{{- $points := len (default (list 1 2 3 4) .Values.data.hook_points) }}
{{- $ranks := mul (int .Values.train.nodes) (int .Values.train.ranksPerNode) }}
{{- if and .Values.train.enabled (gt (int $ranks) $points) }}{{ fail (printf "train.nodes x train.ranksPerNode is %d, and there are %d SAEs: a rank trains whole ones" $ranks $points) }}{{ end }}
{{- if and .Values.train.cached (not .Values.collect.enabled) (not .Values.volume.claim) }}{{ fail "train.cached is true, and nothing fills the new volume: collect.enabled is false and volume.claim is empty" }}{{ end }}
{{- range $name := list "cache" "out" "work" "workers" "chunks" }}
{{- if or (hasKey $.Values.data $name) (hasKey $.Values.train.settings $name) }}{{ fail (printf "%s is the chart's own: take it out of data and train.settings" $name) }}{{ end }}
{{- end }}
{{- end }}

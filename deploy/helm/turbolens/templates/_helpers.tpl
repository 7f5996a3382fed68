{{- define "turbolens.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "turbolens.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "turbolens.name" .) .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (include "turbolens.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What finds pods of a component: dict "root" . "component" "server". */}}
{{- define "turbolens.selector" -}}
app.kubernetes.io/name: {{ include "turbolens.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "turbolens.labels" -}}
{{ include "turbolens.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* An image: dict "root" . "tag" "0.1.0-cpu"; a digest is that of the server's. */}}
{{- define "turbolens.image" -}}
{{- with .root.Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default (printf "%s-%s" $.root.Chart.AppVersion (ternary "cuda" "cpu" $.root.Values.gpu.enabled)) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "turbolens.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "turbolens.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What a start takes at most, and after what a stopping pod is killed. */}}
{{- define "turbolens.terminationSeconds" -}}
{{- add (int .Values.timing.drainSeconds) (int .Values.timing.graceSeconds) 15 }}
{{- end }}

{{- define "turbolens.scaleDownSeconds" -}}
{{- .Values.autoscaling.scaleDownSeconds | int | default (add (int .Values.timing.startupSeconds) (int .Values.timing.graceSeconds) 30) }}
{{- end }}

{{- define "turbolens.tlsSecret" -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "turbolens.fullname" .)) }}
{{- end }}

{{- define "turbolens.modelsClaim" -}}
{{- .Values.models.volume.claim | default (printf "%s-models" (include "turbolens.fullname" .)) }}
{{- end }}

{{- define "turbolens.cacheClaim" -}}
{{- .Values.cache.claim | default (printf "%s-cache" (include "turbolens.fullname" .)) }}
{{- end }}

{{/* The settings file: what was given, and what the chart decides. JSON's texts, numbers and lists are TOML's too. */}}
{{- define "turbolens.settings" -}}
{{- $made := dict
  "port" (int .Values.ports.grpc)
  "health_port" (int .Values.ports.health)
  "metrics_port" (int .Values.ports.metrics)
  "grace_s" (int .Values.timing.graceSeconds) }}
{{- if .Values.tls.enabled }}
{{- $made = merge $made (dict "tls_cert" "/etc/turbolens/tls/tls.crt" "tls_key" "/etc/turbolens/tls/tls.key") }}
{{- if .Values.tls.clientCA.enabled }}
{{- $made = set $made "tls_client_ca" (ternary "/etc/turbolens/client-ca/ca.crt" "/etc/turbolens/tls/ca.crt" (ne .Values.tls.clientCA.existingSecret "")) }}
{{- end }}
{{- end }}
{{- if .Values.auth.existingSecret }}
{{- $made = set $made "tokens" "/etc/turbolens/auth/tokens" }}
{{- end }}
{{- range $name, $value := merge $made .Values.settings }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}

{{/* How a pod of ours finds and convinces the server. */}}
{{- define "turbolens.clientEnv" -}}
- name: TURBOLENS_TARGET
  value: {{ printf "%s.%s.svc:%d" (include "turbolens.fullname" .) .Release.Namespace (int .Values.ports.grpc) }}
{{- if .Values.auth.clientSecret }}
- name: TURBOLENS_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.clientSecret }}
      key: token
{{- end }}
{{- if .Values.tls.enabled }}
- name: TURBOLENS_TLS_CA
  value: /etc/turbolens/tls/ca.crt
{{- if .Values.tls.clientCA.enabled }}
- name: TURBOLENS_TLS_CERT
  value: /etc/turbolens/tls/tls.crt
- name: TURBOLENS_TLS_KEY
  value: /etc/turbolens/tls/tls.key
{{- end }}
{{- end }}
{{- end }}

{{/* What contradicts itself, by the names of the values. */}}
{{- define "turbolens.check" -}}
{{- $v := .Values }}
{{- $device := toString ($v.settings.device | default "auto") }}
{{- if and $v.gpu.enabled (eq $device "cpu") }}{{ fail "gpu.enabled is true and settings.device is cpu: take one back" }}{{ end }}
{{- if and (not $v.gpu.enabled) (hasPrefix "cuda" $device) }}{{ fail (printf "settings.device is %s and gpu.enabled is false: the pod would get no GPU" $device) }}{{ end }}
{{- if $v.engines.build }}
{{- if not $v.gpu.enabled }}{{ fail "engines.build needs gpu.enabled: TensorRT builds for the GPU of its machine" }}{{ end }}
{{- if ne (toString ($v.settings.backend | default "auto")) "tensorrt" }}{{ fail "engines.build is true and settings.backend is not tensorrt: nothing would run the engines" }}{{ end }}
{{- if eq $v.cache.kind "emptyDir" }}{{ fail "engines.build needs cache.kind new or claim: every pod would build its engines again" }}{{ end }}
{{- end }}
{{- $most := int $v.replicas }}
{{- if ne $v.autoscaling.kind "none" }}
{{- $most = int $v.autoscaling.max }}
{{- if gt (int $v.autoscaling.min) (int $v.autoscaling.max) }}{{ fail (printf "autoscaling.min is %d and autoscaling.max is %d" (int $v.autoscaling.min) (int $v.autoscaling.max)) }}{{ end }}
{{- if not (int $v.ports.metrics) }}{{ fail "autoscaling.kind needs ports.metrics: it scales by the queue's metrics" }}{{ end }}
{{- if and (eq $v.autoscaling.kind "keda") (not $v.autoscaling.prometheus) }}{{ fail "autoscaling.kind is keda: name Prometheus' address in autoscaling.prometheus" }}{{ end }}
{{- $least := add (int $v.timing.startupSeconds) (int $v.timing.graceSeconds) }}
{{- if lt (int (include "turbolens.scaleDownSeconds" .)) (int $least) }}{{ fail (printf "autoscaling.scaleDownSeconds is %d: pods would go sooner than one starts and ends its longest request (timing: %d s)" (int $v.autoscaling.scaleDownSeconds) $least) }}{{ end }}
{{- end }}
{{- range $where, $volume := dict "models.volume" $v.models.volume "cache" $v.cache }}
{{- if and (eq $volume.kind "claim") (not $volume.claim) }}{{ fail (printf "%s.kind is claim: name it in %s.claim" $where $where) }}{{ end }}
{{- if and (eq $volume.kind "new") (gt $most 1) (ne $volume.accessMode "ReadWriteMany") }}{{ fail (printf "%s.accessMode is %s and there may be %d pods, on as many nodes: take ReadWriteMany, or one pod" $where $volume.accessMode $most) }}{{ end }}
{{- end }}
{{- if and (eq $v.models.volume.kind "image") (not $v.models.volume.image) }}{{ fail "models.volume.kind is image: name it, by digest, in models.volume.image" }}{{ end }}
{{- if and (eq $v.models.volume.kind "image") (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) }}{{ fail (printf "models.volume.kind is image: Kubernetes 1.33 is the first with ImageVolume for everyone, and this is %s" .Capabilities.KubeVersion.Version) }}{{ end }}
{{- if and $v.models.fetch (not (has $v.models.volume.kind (list "claim" "new"))) }}{{ fail (printf "models.fetch needs models.volume.kind claim or new, and it is %s" $v.models.volume.kind) }}{{ end }}
{{- if and (gt (int $v.rollout.maxSurge) 0) (eq $v.cache.kind "new") (ne $v.cache.accessMode "ReadWriteMany") }}{{ fail "rollout.maxSurge is above 0 and cache.accessMode is not ReadWriteMany: a new pod would wait for the old one's volume for ever" }}{{ end }}
{{- if and (eq (int $v.rollout.maxSurge) 0) (eq (int $v.rollout.maxUnavailable) 0) }}{{ fail "rollout.maxSurge and rollout.maxUnavailable are both 0: nothing could ever be replaced" }}{{ end }}
{{- if $v.tls.enabled }}
{{- if and $v.tls.existingSecret $v.tls.certManager.enabled }}{{ fail "tls.existingSecret and tls.certManager.enabled: take one back" }}{{ end }}
{{- if not (or $v.tls.existingSecret $v.tls.certManager.enabled) }}{{ fail "tls.enabled needs tls.existingSecret or tls.certManager.enabled" }}{{ end }}
{{- if and $v.tls.certManager.enabled (not $v.tls.certManager.issuer) }}{{ fail "tls.certManager.enabled needs tls.certManager.issuer" }}{{ end }}
{{- else if or $v.tls.existingSecret $v.tls.certManager.enabled $v.tls.clientCA.enabled }}{{ fail "tls.enabled is false and another value of tls asks for it" }}
{{- end }}
{{- if and $v.auth.clientSecret (not $v.auth.existingSecret) }}{{ fail "auth.clientSecret is given and auth.existingSecret is not: nobody would ask for the token" }}{{ end }}
{{- if and $v.auth.clientSecret (not $v.tls.enabled) }}{{ fail "auth.clientSecret needs tls.enabled: the SDK sends no token in the clear" }}{{ end }}
{{- if and $v.gateway.enabled $v.tls.enabled }}
{{- if $v.tls.clientCA.enabled }}{{ fail "gateway.enabled and tls.clientCA.enabled: a gateway ends its callers' TLS and shows no certificate of theirs" }}{{ end }}
{{- if not $v.gateway.backendCA }}{{ fail "gateway.enabled and tls.enabled: name in gateway.backendCA who signed the server's certificate" }}{{ end }}
{{- end }}
{{- if and $v.gateway.enabled (not $v.gateway.parentRefs) }}{{ fail "gateway.enabled needs gateway.parentRefs" }}{{ end }}
{{- if and $v.monitoring.podMonitor.enabled (not (int $v.ports.metrics)) }}{{ fail "monitoring.podMonitor.enabled needs ports.metrics" }}{{ end }}
{{- $ports := list }}
{{- range $name, $port := $v.ports }}
{{- if int $port }}
{{- if has (int $port) $ports }}{{ fail (printf "ports.%s is %d, as is another of ports" $name (int $port)) }}{{ end }}
{{- $ports = append $ports (int $port) }}
{{- end }}
{{- end }}
{{- end }}

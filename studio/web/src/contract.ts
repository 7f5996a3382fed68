// Messages of the contract as JSON; made by tools/ts_types.py from proto/: edit there.

export interface EditJson {
  features?: WeightedFeatureJson[];
  add?: AddEditJson;
  scale?: ScaleEditJson;
  set?: SetEditJson;
  replace?: ReplaceEditJson;
  patch?: PatchEditJson;
  transfer?: TransferEditJson;
  mask?: MaskJson;
  steps?: StepRangeJson;
  reference?: string;
  amounts?: number[];
  condition?: ConditionJson;
  side?: "SIDE_UNSPECIFIED" | "SIDE_COND" | "SIDE_CONTRAST" | "SIDE_BOTH";
}

export interface ModelJson {
  name?: string;
  hash?: string;
  hookPoints?: HookPointJson[];
  saes?: SaeJson[];
  limits?: LimitsJson;
  defaults?: SamplingJson;
  editKinds?: string[];
  sources?: string[];
  backend?: string;
  device?: string;
  dtype?: string;
  versions?: Record<string, string>;
  backendReason?: string;
  memory?: MemoryJson;
  loadSeconds?: number;
  componentsHash?: string;
  scheduler?: SchedulerJson;
  loras?: LoraJson[];
  otherHookPoints?: HookPointJson[];
  gate?: GateJson;
}

export interface WeightedFeatureJson {
  feature?: FeatureRefJson;
  weight?: number;
}

export interface AddEditJson {
  strength?: number;
  unit?: "UNIT_UNSPECIFIED" | "UNIT_RAW" | "UNIT_MEAN" | "UNIT_NORM" | "UNIT_REFERENCE";
}

export interface ScaleEditJson {
  factor?: number;
}

export interface SetEditJson {
  value?: number;
  unit?: "UNIT_UNSPECIFIED" | "UNIT_RAW" | "UNIT_MEAN" | "UNIT_NORM" | "UNIT_REFERENCE";
}

export interface ReplaceEditJson {
  strength?: number;
  unit?: "UNIT_UNSPECIFIED" | "UNIT_RAW" | "UNIT_MEAN" | "UNIT_NORM" | "UNIT_REFERENCE";
}

export interface PatchEditJson {
  hookPoints?: string[];
}

export interface TransferEditJson {
  multiplier?: number;
  remove?: FeatureRefJson[];
  choice?: FeatureChoiceJson;
}

export interface MaskJson {
  boxes?: BoxesJson;
  polygons?: PolygonsJson;
  png?: string;
}

export interface StepRangeJson {
  start?: number;
  end?: number;
}

export interface ConditionJson {
  feature?: FeatureRefJson;
  above?: number;
  below?: number;
  map?: number;
  unit?: "UNIT_UNSPECIFIED" | "UNIT_RAW" | "UNIT_MEAN" | "UNIT_NORM" | "UNIT_REFERENCE";
}

export interface HookPointJson {
  name?: string;
  module?: string;
  dModel?: number;
  height?: number;
  width?: number;
}

export interface SaeJson {
  name?: string;
  hookPoint?: string;
  architecture?: string;
  dSae?: number;
  k?: number;
  hash?: string;
  units?: ("UNIT_UNSPECIFIED" | "UNIT_RAW" | "UNIT_MEAN" | "UNIT_NORM" | "UNIT_REFERENCE")[];
  labels?: number;
  provenanceJson?: string;
  forced?: boolean;
  kMax?: number;
  prefixes?: number[];
  steps?: number;
}

export interface LimitsJson {
  maxPromptChars?: number;
  maxPromptTokens?: number;
  maxSteps?: number;
  maxSeeds?: number;
  maxEdits?: number;
  maxFeaturesPerEdit?: number;
  maxStrength?: number;
  sizes?: SizeJson[];
  maxMaskBytes?: number;
  maxMessageBytes?: number;
  maxBatch?: number;
  maxQueue?: number;
  maxQueuePictures?: number;
  maxRequestIdChars?: number;
  maxMaskShapes?: number;
  maxMaskPoints?: number;
  maxMaskPixels?: number;
  maxMaskEdge?: number;
  maxQueryChars?: number;
  maxFilterChars?: number;
  maxListed?: number;
  maxFound?: number;
  maxRequestFeatures?: number;
  maxReferences?: number;
  maxRequestBytes?: number;
  maxSelected?: number;
  maxSaes?: number;
  maxGuidanceScale?: number;
  maxPictureBytes?: number;
  maxRegions?: number;
}

export interface SamplingJson {
  steps?: number;
  width?: number;
  height?: number;
  guidanceScale?: number;
  timesteps?: number[];
  guidanceRescale?: number;
  negativePrompt?: string;
}

export interface MemoryJson {
  weightsBytes?: string;
  saeBytes?: string;
  activationBytes?: string;
  availableBytes?: string;
}

export interface SchedulerJson {
  name?: string;
  timestepSpacing?: string;
  previews?: boolean;
  takesTimesteps?: boolean;
  trainTimesteps?: number;
  timesteps?: number[];
  embeddedGuidance?: number;
}

export interface LoraJson {
  name?: string;
  weight?: number;
  hash?: string;
}

export interface GateJson {
  hash?: string;
  layers?: string[];
  threshold?: number;
  closed?: number;
  provenanceJson?: string;
  forced?: boolean;
}

export interface FeatureRefJson {
  sae?: string;
  index?: number;
}

export interface FeatureChoiceJson {
  features?: number;
  saes?: string[];
  allSteps?: boolean;
  ownMask?: MaskJson;
}

export interface BoxesJson {
  boxes?: BoxJson[];
}

export interface PolygonsJson {
  polygons?: PolygonJson[];
}

export interface SizeJson {
  width?: number;
  height?: number;
}

export interface BoxJson {
  left?: number;
  top?: number;
  right?: number;
  bottom?: number;
}

export interface PolygonJson {
  points?: PointJson[];
}

export interface PointJson {
  x?: number;
  y?: number;
}

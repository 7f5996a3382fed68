"""TurboLens: pictures of SDXL Turbo, the features behind them, and steering by those features.

import turbolens as tl

with tl.connect("localhost:50051") as lens:
    picture = lens.generate("a big red star on the left, night background", seed=7)
    blue = lens.search_features("blue", block="up.0.1")[0]
    steered = lens.generate(picture.prompt, seed=7, steer=[tl.add(blue, 8, mask=tl.box(0, 0, 0.5, 1))])
"""

from turbolens import aio, steering
from turbolens._attribution import Attribution, Source
from turbolens._average import Average, AverageFeature, average
from turbolens._blocks import BlockFeatures, RunFeatures, TopFeature
from turbolens._channel import TLS
from turbolens._compare import Comparison, compare
from turbolens._contrast import Difference
from turbolens._edits import (
    Choice,
    Condition,
    Edit,
    FeatureRef,
    Mask,
    ablate,
    add,
    box,
    boxes,
    choose,
    edits_from_json,
    edits_to_json,
    feature,
    mask,
    patch,
    polygon,
    replace,
    scale,
    set_to,
    transfer,
    where,
)
from turbolens._errors import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    FieldViolation,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    TurboLensError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from turbolens._features import Effect, Example, Feature, Label, Match, Near
from turbolens._gallery import Gallery, gallery
from turbolens._leave_out import LeftOut
from turbolens._many.progress import ManyReport, Progress
from turbolens._model import HookPoint, Limits, Model, Sae
from turbolens._provenance import Chosen, Provenance
from turbolens._regions import Located
from turbolens._replay import Manifest, Replay, manifest
from turbolens._results import Coded, Done, Extraction, Features, Picture, PictureReady, Pictures, Queued, Step, Warning
from turbolens._run import Reference, Run, reference
from turbolens._sweep import Sweep, Swept
from turbolens._sync import Lens, connect
from turbolens._table import Table

__all__ = [
    "TLS",
    "Attribution",
    "Average",
    "AverageFeature",
    "BlockFeatures",
    "Cancelled",
    "Choice",
    "Chosen",
    "Closed",
    "Coded",
    "Comparison",
    "Condition",
    "DeadlineExceeded",
    "Difference",
    "Done",
    "Edit",
    "Effect",
    "Example",
    "Extraction",
    "Feature",
    "FeatureRef",
    "Features",
    "FieldViolation",
    "Gallery",
    "HookPoint",
    "InternalError",
    "InvalidRequest",
    "Label",
    "LeftOut",
    "Lens",
    "Limits",
    "Located",
    "Manifest",
    "ManyReport",
    "Mask",
    "Match",
    "Model",
    "Near",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "Picture",
    "PictureReady",
    "Pictures",
    "Progress",
    "Provenance",
    "Queued",
    "Reference",
    "Replay",
    "Run",
    "RunFeatures",
    "Sae",
    "Source",
    "Step",
    "Sweep",
    "Swept",
    "Table",
    "TopFeature",
    "TurboLensError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Warning",
    "ablate",
    "add",
    "aio",
    "average",
    "box",
    "boxes",
    "choose",
    "compare",
    "connect",
    "edits_from_json",
    "edits_to_json",
    "feature",
    "gallery",
    "manifest",
    "mask",
    "patch",
    "polygon",
    "reference",
    "replace",
    "scale",
    "set_to",
    "steering",
    "transfer",
    "where",
]

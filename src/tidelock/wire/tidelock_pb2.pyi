from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    FP32: _ClassVar[Codec]
    BF16: _ClassVar[Codec]
    INT8: _ClassVar[Codec]
    INT4: _ClassVar[Codec]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    TRAIN: _ClassVar[Mode]
    EVALUATE: _ClassVar[Mode]
    GENERATE: _ClassVar[Mode]

class FrameKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_KIND_UNSPECIFIED: _ClassVar[FrameKind]
    SEEDED: _ClassVar[FrameKind]
    SVD: _ClassVar[FrameKind]
CODEC_UNSPECIFIED: Codec
FP32: Codec
BF16: Codec
INT8: Codec
INT4: Codec
MODE_UNSPECIFIED: Mode
TRAIN: Mode
EVALUATE: Mode
GENERATE: Mode
FRAME_KIND_UNSPECIFIED: FrameKind
SEEDED: FrameKind
SVD: FrameKind

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Description(_message.Message):
    __slots__ = ("protocol", "model_type", "config_json", "fingerprint", "num_tensors", "tensors", "files", "num_blocks", "backbone_dtype", "max_tokens", "version", "max_active")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_TENSORS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BACKBONE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model_type: str
    config_json: str
    fingerprint: str
    num_tensors: int
    tensors: _containers.RepeatedCompositeFieldContainer[Artefact]
    files: _containers.RepeatedCompositeFieldContainer[Artefact]
    num_blocks: int
    backbone_dtype: str
    max_tokens: int
    version: str
    max_active: int
    def __init__(self, protocol: _Optional[int] = ..., model_type: _Optional[str] = ..., config_json: _Optional[str] = ..., fingerprint: _Optional[str] = ..., num_tensors: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Artefact, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[Artefact, _Mapping]]] = ..., num_blocks: _Optional[int] = ..., backbone_dtype: _Optional[str] = ..., max_tokens: _Optional[int] = ..., version: _Optional[str] = ..., max_active: _Optional[int] = ...) -> None: ...

class Artefact(_message.Message):
    __slots__ = ("name", "sha256", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class NormReport(_message.Message):
    __slots__ = ("protocol", "fingerprint", "rule", "period", "modules")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fingerprint: str
    rule: ScheduleRule
    period: int
    modules: _containers.RepeatedCompositeFieldContainer[ModuleNorm]
    def __init__(self, protocol: _Optional[int] = ..., fingerprint: _Optional[str] = ..., rule: _Optional[_Union[ScheduleRule, _Mapping]] = ..., period: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[ModuleNorm, _Mapping]]] = ...) -> None: ...

class ScheduleRule(_message.Message):
    __slots__ = ("name", "budget", "threshold", "warm_up", "exchange", "longest_sleep", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    WARM_UP_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_FIELD_NUMBER: _ClassVar[int]
    LONGEST_SLEEP_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    budget: int
    threshold: float
    warm_up: int
    exchange: float
    longest_sleep: int
    seed: int
    def __init__(self, name: _Optional[str] = ..., budget: _Optional[int] = ..., threshold: _Optional[float] = ..., warm_up: _Optional[int] = ..., exchange: _Optional[float] = ..., longest_sleep: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class ModuleNorm(_message.Message):
    __slots__ = ("block", "active", "norm", "last_active")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    LAST_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    block: int
    active: bool
    norm: float
    last_active: int
    def __init__(self, block: _Optional[int] = ..., active: bool = ..., norm: _Optional[float] = ..., last_active: _Optional[int] = ...) -> None: ...

class ScheduleCommand(_message.Message):
    __slots__ = ("period", "kill", "revive", "max_active")
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    KILL_FIELD_NUMBER: _ClassVar[int]
    REVIVE_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVE_FIELD_NUMBER: _ClassVar[int]
    period: int
    kill: _containers.RepeatedScalarFieldContainer[int]
    revive: _containers.RepeatedScalarFieldContainer[int]
    max_active: int
    def __init__(self, period: _Optional[int] = ..., kill: _Optional[_Iterable[int]] = ..., revive: _Optional[_Iterable[int]] = ..., max_active: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class FetchPart(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "fingerprint", "mode", "starts", "lengths", "width", "shared", "selected", "active", "activation_codec", "gradient_codec", "rounding_seed", "learns_from", "taps", "frames")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    SELECTED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CODEC_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CODEC_FIELD_NUMBER: _ClassVar[int]
    ROUNDING_SEED_FIELD_NUMBER: _ClassVar[int]
    LEARNS_FROM_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fingerprint: str
    mode: Mode
    starts: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    width: int
    shared: int
    selected: _containers.RepeatedScalarFieldContainer[int]
    active: _containers.RepeatedCompositeFieldContainer[ActiveSite]
    activation_codec: Codec
    gradient_codec: Codec
    rounding_seed: int
    learns_from: int
    taps: Taps
    frames: Frames
    def __init__(self, protocol: _Optional[int] = ..., fingerprint: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., starts: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., width: _Optional[int] = ..., shared: _Optional[int] = ..., selected: _Optional[_Iterable[int]] = ..., active: _Optional[_Iterable[_Union[ActiveSite, _Mapping]]] = ..., activation_codec: _Optional[_Union[Codec, str]] = ..., gradient_codec: _Optional[_Union[Codec, str]] = ..., rounding_seed: _Optional[int] = ..., learns_from: _Optional[int] = ..., taps: _Optional[_Union[Taps, _Mapping]] = ..., frames: _Optional[_Union[Frames, _Mapping]] = ...) -> None: ...

class Frames(_message.Message):
    __slots__ = ("kind", "rank")
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    kind: FrameKind
    rank: int
    def __init__(self, kind: _Optional[_Union[FrameKind, str]] = ..., rank: _Optional[int] = ...) -> None: ...

class Taps(_message.Message):
    __slots__ = ("blocks", "width")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    width: int
    def __init__(self, blocks: _Optional[_Iterable[int]] = ..., width: _Optional[int] = ...) -> None: ...

class ActiveSite(_message.Message):
    __slots__ = ("site", "linears")
    SITE_FIELD_NUMBER: _ClassVar[int]
    LINEARS_FIELD_NUMBER: _ClassVar[int]
    site: int
    linears: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, site: _Optional[int] = ..., linears: _Optional[_Iterable[str]] = ...) -> None: ...

class TensorPart(_message.Message):
    __slots__ = ("site", "codec", "shape", "data")
    SITE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    site: int
    codec: Codec
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, site: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DeviceMessage(_message.Message):
    __slots__ = ("open", "embedding", "site_output", "final_gradient", "input_gradient")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    SITE_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    FINAL_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    embedding: TensorPart
    site_output: TensorPart
    final_gradient: TensorPart
    input_gradient: TensorPart
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., embedding: _Optional[_Union[TensorPart, _Mapping]] = ..., site_output: _Optional[_Union[TensorPart, _Mapping]] = ..., final_gradient: _Optional[_Union[TensorPart, _Mapping]] = ..., input_gradient: _Optional[_Union[TensorPart, _Mapping]] = ...) -> None: ...

class CloudMessage(_message.Message):
    __slots__ = ("site_input", "final_state", "site_gradient", "done", "tap")
    SITE_INPUT_FIELD_NUMBER: _ClassVar[int]
    FINAL_STATE_FIELD_NUMBER: _ClassVar[int]
    SITE_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TAP_FIELD_NUMBER: _ClassVar[int]
    site_input: TensorPart
    final_state: TensorPart
    site_gradient: TensorPart
    done: Done
    tap: TensorPart
    def __init__(self, site_input: _Optional[_Union[TensorPart, _Mapping]] = ..., final_state: _Optional[_Union[TensorPart, _Mapping]] = ..., site_gradient: _Optional[_Union[TensorPart, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., tap: _Optional[_Union[TensorPart, _Mapping]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("compute_seconds", "waiting_seconds")
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    compute_seconds: float
    waiting_seconds: float
    def __init__(self, compute_seconds: _Optional[float] = ..., waiting_seconds: _Optional[float] = ...) -> None: ...

"""Public conventions of hyper-connections, as values: which options each fixes, and where its parameters lie.

All are the streams of this package: they differ in options of `StreamConfig` and in the layout of their tensors.
`load_from` of `ConnectionMaps` and `StreamHead` takes the tensors of a layer or a head, `store_as` gives them back.
Tensors are numpy arrays here, or what `np.asarray` makes one of.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mhc_torch.options import check_choice
from mhc_torch.streams.config import StreamConfig
from mhc_torch.streams.constraints import CONSTRAINTS

Tensors = Mapping[str, Any]
Held = Mapping[str, tuple[str, ...]]  # name of a tensor -> the maps that it holds


class Parameters(NamedTuple):
    """Parameters of maps (m = `config.logits`, three gates) or of a head (m = n, one gate), as they are here."""

    phi: Float[np.ndarray, "nC m"]
    alpha: Float[np.ndarray, " gates"]
    bias: Float[np.ndarray, " m"]


class Layout(ABC):
    """Where the parameters of maps, or of a head, lie in the tensors of a public model."""

    @abstractmethod
    def load(self, tensors: Tensors, config: StreamConfig) -> Parameters:
        """Our parameters. A ValueError where a tensor is missing, or not expected, or of another shape."""

    @abstractmethod
    def store(self, parameters: Parameters, config: StreamConfig) -> dict[str, np.ndarray]:
        """Their tensors. A ValueError where they cannot hold the parameters."""


@dataclasses.dataclass(frozen=True)
class Joint(Layout):
    """One projection of all streams together. Maps are "pre", "post" and "res"; a head is "pre" alone.

    Attributes:
        phi, alpha, bias: by the names of the tensors, the maps whose columns, gates or logits each holds side by side.
            What no tensor holds is 0: nothing reads it.
        rows: phi is (columns, features), as the weight of a linear layer; else it is (features, columns).
        transposed: the residual logits are those of H_res transposed.
        shapes: of the tensors of alpha and bias that are no vectors; "n" and "m" stand for those sizes.
        norm: name of the weight of the norm, which becomes a part of phi, or "".
        norm_offset: what is added to that weight.
        norm_optional: whether it may be missing.
        interleaved: of features, the stream is what runs fastest.
    """

    phi: Held
    alpha: Held
    bias: Held
    rows: bool = False
    transposed: bool = False
    shapes: Mapping[str, tuple[int | str, ...]] = dataclasses.field(default_factory=dict)
    norm: str = ""
    norm_offset: float = 0.0
    norm_optional: bool = False
    interleaved: bool = False

    def load(self, tensors: Tensors, config: StreamConfig) -> Parameters:
        given = self._checked(tensors, config)
        sizes, gates = self._sizes(config), dict.fromkeys(self._maps, 1)
        phi = _joined({name: given[name].T if self.rows else given[name] for name in self.phi}, self.phi, sizes)
        if self.norm in given:
            phi = phi * (given[self.norm] + self.norm_offset)[:, None]
        if self.interleaved:
            phi = phi.reshape(-1, config.streams, phi.shape[-1]).swapaxes(0, 1).reshape(phi.shape)
        flat = {name: given[name].reshape(-1) for name in (*self.alpha, *self.bias)}
        alpha, bias = _joined(flat, self.alpha, gates), _joined(flat, self.bias, sizes)
        alpha = np.concatenate([alpha, np.zeros((1 if self._maps == ("pre",) else 3) - len(alpha), alpha.dtype)])
        order = self._order(config)
        return Parameters(phi[:, order], alpha, bias[order])

    def store(self, parameters: Parameters, config: StreamConfig) -> dict[str, np.ndarray]:
        sizes, gates = self._sizes(config), dict.fromkeys(self._maps, 1)
        order = np.argsort(self._order(config))
        phi = parameters.phi[:, order]
        if self.interleaved:
            phi = phi.reshape(config.streams, -1, phi.shape[-1]).swapaxes(0, 1).reshape(phi.shape)
        tensors = {name: part.T if self.rows else part for name, part in _parted(phi, self.phi, sizes).items()}
        if self.norm:
            tensors[self.norm] = np.full(len(phi), 1 - self.norm_offset, phi.dtype)
        flat = _parted(parameters.alpha, self.alpha, gates) | _parted(parameters.bias[order], self.bias, sizes)
        tensors |= {name: part.reshape(self._shape(name, part.shape, config)) for name, part in flat.items()}
        return {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}

    @property
    def _maps(self) -> tuple[str, ...]:
        held = {name for names in self.phi.values() for name in names}
        return tuple(name for name in ("pre", "post", "res") if name in held)

    def _sizes(self, config: StreamConfig) -> dict[str, int]:
        """How many logits the maps have, in our order."""
        return {name: config.residual_logits if name == "res" else config.streams for name in self._maps}

    def _order(self, config: StreamConfig) -> list[int]:
        """Which of their columns each of ours is."""
        columns = sum(self._sizes(config).values())
        if not self.transposed or "res" not in self._maps:
            return list(range(columns))
        first = 2 * config.streams
        return [*range(first), *(first + i for i in CONSTRAINTS[config.constraint].transposed(config.streams))]

    def _shape(self, name: str, plain: tuple[int, ...], config: StreamConfig) -> tuple[int, ...]:
        sizes = {"n": config.streams, "m": config.logits}
        shape = self.shapes.get(name, plain)
        return tuple(size if isinstance(size, int) else sizes[size] for size in shape)

    def _checked(self, tensors: Tensors, config: StreamConfig) -> dict[str, np.ndarray]:
        names = [*self.phi, *self.alpha, *self.bias, *([self.norm] if self.norm else [])]
        given = _named(tensors, names, [self.norm] if self.norm_optional else [])
        n, axis, sizes = config.streams, 1 if self.rows else 0, self._sizes(config)
        columns = {name: sum(sizes[one] for one in maps) for name, maps in self.phi.items()}
        features = max(given[name].shape[axis] if given[name].ndim == 2 else 0 for name in self.phi)
        if features == 0 or features % n:
            name = next(iter(self.phi))
            wanted = f"({columns[name]}, {n} * width)" if self.rows else f"({n} * width, {columns[name]})"
            raise ValueError(f"{name} must have shape {wanted} for {n} streams, got {given[name].shape}")
        shapes: dict[str, tuple[int, ...]] = {}
        for name, count in columns.items():
            shapes[name] = (count, features) if self.rows else (features, count)
        for name, maps in self.alpha.items():
            shapes[name] = self._shape(name, (len(maps),), config)
        for name, maps in self.bias.items():
            shapes[name] = self._shape(name, (sum(sizes[one] for one in maps),), config)
        if self.norm in given:
            shapes[self.norm] = (features,)
        for name, shape in shapes.items():
            _check_shape(name, given[name], shape, config)
        return given


@dataclasses.dataclass(frozen=True)
class Shared(Layout):
    """A projection that all streams share, each of whose logits is of its own stream: lucidrains' hyper-connections.

    In ours it is a block of phi for each stream. Training may part the blocks, and then they do not go back.
    """

    def load(self, tensors: Tensors, config: StreamConfig) -> Parameters:
        n = config.streams
        given = _named(tensors, self._shapes(config, 0))
        for name, shape in self._shapes(config, given["dynamic_beta_fn"].size).items():
            _check_shape(name, given[name], shape, config)
        reading, writing = given["dynamic_alpha_fn"][0].T, given["dynamic_beta_fn"][None]
        shared = (1 + given["norm.gamma"]) * np.concatenate([reading[:1], writing, reading[1:]])
        phi = np.zeros((n, shared.shape[1], config.logits), shared.dtype)
        for stream in range(n):
            phi[stream, :, self._columns(stream, n)] = shared
        names = ("pre_branch_scale", "h_post_scale", "residual_scale")
        alpha = np.concatenate([given[name].reshape(1) for name in names])
        static = given["static_alpha"]
        bias = np.concatenate([static[:, 0], given["static_beta"], static[:, 1:].T.reshape(-1)])
        return Parameters(phi.reshape(-1, config.logits), alpha, bias)

    def store(self, parameters: Parameters, config: StreamConfig) -> dict[str, np.ndarray]:
        n, bias = config.streams, parameters.bias
        phi = parameters.phi.reshape(n, -1, config.logits)
        shared = phi[0].T[self._columns(0, n)]
        static = np.concatenate([bias[:n, None], bias[2 * n :].reshape(n, n).T], axis=1)
        tensors = {
            "norm.gamma": np.zeros(phi.shape[1], phi.dtype),
            "dynamic_alpha_fn": np.ascontiguousarray(shared[[0, *range(2, n + 2)]].T[None]),
            "dynamic_beta_fn": shared[1],
            "static_alpha": static,
            "static_beta": bias[n : 2 * n],
            "pre_branch_scale": parameters.alpha[:1],
            "h_post_scale": parameters.alpha[1].reshape(()),
            "residual_scale": parameters.alpha[2:],
        }
        if not np.array_equal(self.load(tensors, config).phi, parameters.phi):
            raise ValueError("phi must hold one projection for all streams, and none across them, in this convention")
        return tensors

    @staticmethod
    def _columns(stream: int, n: int) -> list[int]:
        """Of our logits those that this stream makes: its H_pre, its H_post, and how it goes into each new stream."""
        return [stream, n + stream, *(2 * n + new * n + stream for new in range(n))]

    @staticmethod
    def _shapes(config: StreamConfig, width: int) -> dict[str, tuple[int, ...]]:
        n = config.streams
        return {
            "norm.gamma": (width,),
            "dynamic_alpha_fn": (1, width, n + 1),
            "dynamic_beta_fn": (width,),
            "static_alpha": (n, n + 1),
            "static_beta": (n,),
            "pre_branch_scale": (1,),
            "h_post_scale": (),
            "residual_scale": (1,),
        }


def _named(tensors: Tensors, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    missing, unknown = sorted({*names} - {*tensors} - {*optional}), sorted({*tensors} - {*names})
    if missing or unknown:
        what = f"{missing} are missing" if missing else f"{unknown} are not expected"
        raise ValueError(f"tensors must be those of this convention, {list(names)}: {what}")
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def _joined(tensors: Tensors, held: Held, sizes: Mapping[str, int]) -> np.ndarray:
    """Maps in the order of `sizes`, along the last axis, out of the tensors that hold them."""
    parts: dict[str, np.ndarray] = {}
    for name, maps in held.items():
        ends = np.cumsum([sizes[one] for one in maps])[:-1]
        parts |= dict(zip(maps, np.split(tensors[name], ends, axis=-1), strict=True))
    return np.concatenate([parts[one] for one in sizes], axis=-1)


def _parted(ours: np.ndarray, held: Held, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The tensors of `_joined`; what lies behind the maps is what no tensor holds."""
    parts = dict(zip(sizes, np.split(ours, np.cumsum(list(sizes.values())), axis=-1), strict=False))
    return {name: np.concatenate([parts[one] for one in maps], axis=-1) for name, maps in held.items()}


def _check_shape(name: str, tensor: np.ndarray, shape: tuple[int, ...], config: StreamConfig) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape} for {config.streams} streams, got {tensor.shape}")


@dataclasses.dataclass(frozen=True)
class Convention:
    """How a public model or library computes hyper-connections.

    Attributes:
        source: what defines it, and as of when it was read.
        maps: where the parameters of a branch's maps lie.
        settings: by the name of the model's own setting, its default and the fields of `StreamConfig` that it is.
        fixed: fields of `StreamConfig` that are always so.
        head: where those of the learned reduction lie; None where there is none.
        head_fixed: fields that are others in the head.
        reduction: how the streams end: "head", "mean", "sum", or "last", by the H_pre of the last branch.

    Example:
        >>> config = CONVENTIONS["hy_v4"].config(hc_mult=2, hc_magnitude=1.0)
        >>> config.constraint, config.streams, config.post_scale, config.post_epsilon
        ('identity', 2, 1.0, 1e-06)
    """

    source: str
    maps: Layout
    settings: Mapping[str, tuple[Any, tuple[str, ...]]]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: Layout | None = None
    head_fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reduction: str = "mean"

    def config(self, **settings: Any) -> StreamConfig:
        """The options of the maps, from settings under the names that the model has for them.

        Raises:
            TypeError: a setting is not one of `settings`, or of the wrong type.
            ValueError: a value is out of range.
        """
        if unknown := sorted(settings.keys() - self.settings.keys()):
            raise TypeError(f"unknown settings {unknown}; those of this convention are {sorted(self.settings)}")
        fields = dict(self.fixed)
        for name, (default, ours) in self.settings.items():
            fields |= dict.fromkeys(ours, settings.get(name, default))
        return StreamConfig(**fields)

    def head_config(self, **settings: Any) -> StreamConfig:
        """The options of the head; as `config`."""
        return dataclasses.replace(self.config(**settings), **self.head_fixed)

    def load(self, tensors: Tensors, config: StreamConfig, *, head: bool = False) -> Parameters:
        """Our parameters from the tensors of one branch, or of the head.

        Raises:
            ValueError: `config` is not of this convention; there is no head; a tensor is missing, not expected, or of
                the wrong shape, as those of another number of streams are.
        """
        return self._layout(config, head).load(tensors, config)

    def store(self, parameters: Parameters, config: StreamConfig, *, head: bool = False) -> dict[str, np.ndarray]:
        """The tensors of one branch, or of the head, from our parameters.

        Raises:
            ValueError: as `load`; the parameters are not those of `config`, or the convention cannot hold them.
        """
        layout, n = self._layout(config, head), config.streams
        columns, gates = (n, 1) if head else (config.logits, 3)
        shapes = (len(parameters.phi), columns), (gates,), (columns,)
        for name, given, shape in zip(parameters._fields, parameters, shapes, strict=True):
            _check_shape(name, given, shape, config)
        if len(parameters.phi) % n:
            raise ValueError(f"phi must have {n} * width rows for {n} streams, got {len(parameters.phi)}")
        return layout.store(parameters, config)

    def _layout(self, config: StreamConfig, head: bool) -> Layout:
        layout = self.head if head else self.maps
        if layout is None:
            raise ValueError(f"this convention has no head: its streams end by their {self.reduction}")
        own = self.head_config() if head else self.config()
        free = {"streams", "start", *(field for _, ours in self.settings.values() for field in ours)}
        for field in dataclasses.fields(config):
            ours, given = getattr(own, field.name), getattr(config, field.name)
            if field.name not in free - ({*self.head_fixed} if head else set()) and ours != given:
                raise ValueError(f"config.{field.name} must be {ours!r} in this convention, got {given!r}")
        return layout


def convention_named(name: str) -> Convention:
    """The entry of `CONVENTIONS`; a ValueError for a name that is not there."""
    check_choice("convention", name, CONVENTIONS)
    return CONVENTIONS[name]


def check_assigned(before: Parameters, after: Parameters) -> None:
    """`after` may take the place of `before`.

    Raises:
        ValueError: it was made for another width.
    """
    if before.phi.shape != after.phi.shape:
        raise ValueError(
            f"tensors must be those of {before.phi.shape[0]} features, all streams together, got {after.phi.shape[0]}"
        )


_ALL = ("pre", "post", "res")
_DEEPSEEK = Joint({"fn": _ALL}, {"scale": _ALL}, {"base": _ALL}, rows=True, transposed=True)
_DEEPSEEK_HEAD = Joint({"hc_fn": ("pre",)}, {"hc_scale": ("pre",)}, {"hc_base": ("pre",)}, rows=True)
_MEGATRON = Joint(
    {"mapping_proj.weight": _ALL},
    {"alpha_pre": ("pre",), "alpha_post": ("post",), "alpha_res": ("res",)},
    {"bias": _ALL},
    rows=True,
    transposed=True,
)
_MAXTEXT = Joint(
    {"pre_alpha": ("pre",), "post_alpha": ("post",), "res_alpha": ("res",)},
    {"pre_alpha_scale": ("pre",), "post_alpha_scale": ("post",), "res_alpha_scale": ("res",)},
    {"pre_beta": ("pre",), "post_beta": ("post",), "res_beta": ("res",)},
    transposed=True,
    shapes={"res_beta": ("n", "n")},
    norm="mhc_norm.scale",
)
_MAXTEXT_HEAD = dataclasses.replace(_DEEPSEEK_HEAD, rows=False)
_MAXTEXT_SETTINGS = {
    "mhc_expansion_rate": (4, ("streams",)),
    "sinkhorn_iterations": (20, ("iterations",)),
    "normalization_layer_epsilon": (1e-5, ("norm_epsilon",)),
}
_LITE = Joint(
    {"dynamic_alpha_fn": ("pre", "res"), "dynamic_beta_fn": ("post",)},
    {"pre_branch_scale": ("pre",), "h_post_scale": ("post",), "residual_scale": ("res",)},
    {"static_alpha": ("pre", "res"), "static_beta": ("post",)},
    transposed=True,
    shapes={"h_post_scale": ()},
    norm="norm.gamma",
    norm_offset=1.0,
)
# They divide by the norm, or by 1e-12 if that is more: what only a token of zeros can tell from this.
_NO_EPSILON = 1e-30

CONVENTIONS: dict[str, Convention] = {
    "deepseek_v4": Convention(
        "transformers 5.23, models/deepseek_v4: DeepseekV4HyperConnection and DeepseekV4HyperHead",
        _DEEPSEEK,
        {
            "hc_mult": (4, ("streams",)),
            "hc_sinkhorn_iters": (20, ("iterations",)),
            "hc_eps": (1e-6, ("epsilon",)),
            "rms_norm_eps": (1e-6, ("norm_epsilon",)),
        },
        head=_DEEPSEEK_HEAD,
        reduction="head",
    ),
    "glm5_next": Convention(
        "GLM-5.3: transformers 5.23, models/glm5_next: Glm5NextTextHyperConnection and Glm5NextTextHyperHead",
        _DEEPSEEK,
        {
            "hc_mult": (4, ("streams",)),
            "hc_sinkhorn_iters": (20, ("iterations",)),
            "hc_eps": (1e-6, ("epsilon",)),
            "rms_norm_eps": (1e-5, ("norm_epsilon",)),
        },
    ),
    "hy_v4": Convention(
        "Hy4: transformers 5.23, models/hy_v4: HYV4HyperConnection and HYV4HyperHead",
        Joint({"fn": ("pre", "post")}, {"scale": ("pre", "post")}, {"base": ("pre", "post")}, rows=True),
        {
            "hc_mult": (4, ("streams",)),
            "hc_magnitude": (2.0, ("post_scale",)),
            "hc_eps": (1e-6, ("pre_epsilon", "post_epsilon")),
            "rms_norm_eps": (1e-5, ("norm_epsilon",)),
        },
        {"constraint": "identity"},
        head=_DEEPSEEK_HEAD,
        reduction="head",
    ),
    "megatron": Convention(
        "Megatron-LM, megatron/core/transformer/hyper_connection.py at 023f5cf: HyperConnectionModule",
        _MEGATRON,
        {"num_residual_streams": (4, ("streams",)), "mhc_sinkhorn_iterations": (20, ("iterations",))},
        {"epsilon": 1e-6, "norm": "rms_outside", "norm_epsilon": 1e-6},
        head=Joint({"hc_head_fn": ("pre",)}, {"hc_head_scale": ("pre",)}, {"hc_head_base": ("pre",)}, rows=True),
        head_fixed={"norm": "rms"},
        reduction="head",
    ),
    "deepseek_v4_1": Convention(
        "DeepSeek-V4.1: Megatron-LM, megatron/core/transformer/hyper_connection.py at 023f5cf, with mhc_single_pass",
        _MEGATRON,
        {
            "num_residual_streams": (4, ("streams",)),
            "mhc_sinkhorn_iterations": (20, ("iterations",)),
            "mhc_epsilon": (1e-6, ("epsilon",)),
            "layernorm_epsilon": (1e-5, ("norm_epsilon",)),
        },
        {"single_pass": True},
        reduction="last",
    ),
    "liger": Convention(
        "Liger-Kernel 0.8.2, src/liger_kernel/transformers/mhc.py at ead96b6: LigerMHC",
        Joint(
            {"phi": _ALL},
            {"alpha_pre": ("pre",), "alpha_post": ("post",), "alpha_res": ("res",)},
            {"b": _ALL},
            shapes={"alpha_pre": (), "alpha_post": (), "alpha_res": ()},
        ),
        {
            "hc": (4, ("streams",)),
            "tmax": (20, ("iterations",)),
            "rms_eps": (1e-6, ("norm_epsilon",)),
            "pre_eps": (0.0, ("pre_epsilon",)),
            "sinkhorn_eps": (1e-6, ("epsilon",)),
            "post_mult": (2.0, ("post_scale",)),
        },
        {"order": "rows"},
    ),
    "tile_kernels": Convention(
        "TileKernels, tile_kernels/modeling/mhc/functional.py at 36d9e45: mhc_pre, mhc_post and mhc_head",
        dataclasses.replace(_DEEPSEEK, norm="norm_weight", norm_optional=True),
        {
            "mhc_mult": (4, ("streams",)),
            "norm_eps": (1e-6, ("norm_epsilon",)),
            "post_mult_value": (1.0, ("post_scale",)),
            "pre_eps": (1e-6, ("pre_epsilon",)),
            "sinkhorn_eps": (1e-6, ("epsilon",)),
            "sinkhorn_repeat": (10, ("iterations",)),
        },
        head=Joint(
            {"fn": ("pre",)}, {"scale": ("pre",)}, {"base": ("pre",)}, rows=True, norm="norm_weight", norm_optional=True
        ),
        reduction="head",
    ),
    # Its streams are (..., C, n): swap the last two axes.
    "transformer_engine": Convention(
        "TransformerEngine, transformer_engine/pytorch/triton/mhc.py at 0456c81: mhc_fused_projection and after",
        Joint(
            {"phi": _ALL},
            {"alpha": _ALL},
            {"beta": _ALL},
            rows=True,
            transposed=True,
            shapes={"beta": (1, "m")},
            interleaved=True,
        ),
        {"n": (4, ("streams",)), "iters": (20, ("iterations",))},
        {"norm_epsilon": float(np.finfo(np.float32).eps)},
    ),
    "maxtext": Convention(
        "MaxText, src/maxtext/layers/mhc.py at e591f30: ManifoldConstrainedHyperConnections and DeepSeek4HyperHead",
        _MAXTEXT,
        _MAXTEXT_SETTINGS,
        {"epsilon": 1e-6},
        head=_MAXTEXT_HEAD,
        reduction="sum",
    ),
    "maxtext_lite": Convention(
        "MaxText, as above with enable_mhc_lite",
        dataclasses.replace(_MAXTEXT, shapes={}),
        _MAXTEXT_SETTINGS,
        {"constraint": "permutations", "pre_epsilon": 1e-6},
        head=_MAXTEXT_HEAD,
        reduction="sum",
    ),
    "mhc_lite": Convention(
        "mHC-lite (arXiv 2601.05732), hyper_conn/mhc_lite.py at ea19775: MHCLite",
        _LITE,
        {"num_residual_streams": (4, ("streams",))},
        {"constraint": "permutations", "norm_epsilon": _NO_EPSILON},
        reduction="sum",
    ),
    "kromhc": Convention(
        "KromHC (arXiv 2601.21579), hyper_conn/Kromhc.py at 7b15834: KromHC",
        _LITE,
        {"num_residual_streams": (4, ("streams",))},
        {"constraint": "kronecker", "norm_epsilon": _NO_EPSILON},
        reduction="sum",
    ),
    "lucidrains": Convention(
        "hyper-connections 0.4.11, manifold_constrained_hyper_connections.py: ManifoldConstrainedHyperConnections",
        Shared(),
        {"num_residual_streams": (4, ("streams",)), "sinkhorn_iters": (20, ("iterations",))},
        {"order": "rows", "norm": "streams", "norm_epsilon": _NO_EPSILON},
        reduction="sum",
    ),
}
"""Every convention under its name."""

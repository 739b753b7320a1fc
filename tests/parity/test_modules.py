"""Modules that both packages have take the same keywords with the same defaults, and refuse in the same words."""

import inspect

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

import mhc_jax.models as jax_models
import mhc_jax.nn as jax_nn
import mhc_torch.models as torch_models
import mhc_torch.nn as torch_nn
from mhc_jax.history.config import MatrixConfig, MHCConfig
from mhc_jax.streams import StreamConfig
from mhc_torch.history.config import MHCConfig as TorchConfig

PAIRS = {
    name: (getattr(jax_nn, name), getattr(torch_nn, name)) for name in sorted({*jax_nn.__all__} & {*torch_nn.__all__})
}
PAIRS["MHCConv"] = (jax_nn.MHCConv, torch_nn.MHCConv2d)
PAIRS["Decoder"] = (jax_models.Decoder, torch_models.Decoder)

# The names that flax and torch have for the same thing in their own layers.
SAME = {"in_channels": "in_features", "out_channels": "features", "stride": "strides", "bias": "use_bias"}
HISTORY = set(MHCConfig.__dataclass_fields__)
TORCH_ALONE = set(TorchConfig.__dataclass_fields__) - HISTORY

# What one package has and the other has not, and why.
EXCEPTIONS = {
    "rngs": "torch draws from a generator of its own",
    "dtype": "torch converts a model by .to()",
    "param_dtype": "as dtype",
    "state_dtype": "as dtype",
    "implementation": "torch has kernels of streams alone",
    "attention": "torch chooses by itself among its forms",
    "policy": "of jax.checkpoint; torch has use_checkpointing",
    "remat": "as policy",
    "use_checkpointing": "see policy",
    "features": "torch sees the widths of auto_project at the first forward",
    "history_features": "as features",
    "make_layer": "a stack of JAX is one scan over equal layers, which it makes; torch takes the layers",
    "depth": "as make_layer",
    "layers": "as make_layer",
    "groups": "of torch.nn.Conv2d, for the order of its arguments",
    "dilation": "as groups",
}
OWN = {  # arguments of a pair that EXCEPTIONS must not hide elsewhere, and defaults that differ
    "MHCConv": {"padding", "out_features", "features", "kernel_size"},  # those of torch.nn.Conv2d and nnx.Conv
}
HIDDEN = {"MHCBasicBlock": {"features"}, "MHCBottleneck": {"features"}}


def keywords(module):
    """Names and defaults of the constructor; fields of a configuration that **options takes stand for themselves."""
    found = {}
    for name, parameter in inspect.signature(module.__init__).parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            found[SAME.get(name, name)] = parameter.default
    return found


def takes_options(module):
    parameters = inspect.signature(module.__init__).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


@pytest.mark.parametrize("pair", PAIRS)
def test_keywords_and_defaults(pair):
    ours, theirs = map(keywords, PAIRS[pair])
    assert takes_options(PAIRS[pair][0]) == takes_options(PAIRS[pair][1])
    assert "config" in ours.keys() & theirs.keys()
    of_history = takes_options(PAIRS[pair][0]) and pair not in ("Decoder", "HyperConnections", "StreamHead")
    fields = HISTORY | TORCH_ALONE if of_history else set()
    alone = (ours.keys() ^ theirs.keys()) - fields
    hidden = HIDDEN.get(pair, set())
    assert alone <= (EXCEPTIONS.keys() - hidden) | OWN.get(pair, set())
    for name in ours.keys() & theirs.keys():
        assert name in OWN.get(pair, set()) or ours[name] == theirs[name], name
    for name in (ours.keys() | theirs.keys()) & (fields | set(MatrixConfig.__dataclass_fields__)):
        assert (ours | theirs)[name] is None, f"{name} must come from the config"


def test_every_exception_is_needed():
    alone = {name for pair in PAIRS.values() for name in keywords(pair[0]).keys() ^ keywords(pair[1]).keys()}
    assert EXCEPTIONS.keys() <= alone


RNGS = nnx.Rngs(0)


def zeros(*shape):
    return jnp.zeros(shape), torch.zeros(shape)


def both(make):
    """`make` with what each package has: modules, a branch, models, zeros, and the random streams that JAX needs."""
    return (
        lambda: make(jax_nn, nnx.Linear(3, 3, rngs=RNGS), jax_models, lambda *shape: jnp.zeros(shape), {"rngs": RNGS}),
        lambda: make(torch_nn, nn.Linear(3, 3), torch_models, lambda *shape: torch.zeros(shape), {}),
    )


SIZES = {"vocabulary": 5, "features": 4, "mlp_features": 6, "depth": 1, "num_heads": 2}


def sizes(models, **changes):
    return models.DecoderConfig(**SIZES | changes)


BAD = {
    "max_history": lambda n, f, m, z, r: n.MHCSkip(max_history=0),
    "type of max_history": lambda n, f, m, z, r: n.MHCSkip(max_history=2.0),
    "unknown option": lambda n, f, m, z, r: n.MHCSkip(alpha=1),
    "config": lambda n, f, m, z, r: n.MHCSkip(config={"mode": "hc"}),
    "config of another kind": lambda n, f, m, z, r: n.MatrixMHCSkip(config=3, **r),
    "matrix": lambda n, f, m, z, r: n.MatrixMHCSkip(0, **r),
    "iterations": lambda n, f, m, z, r: n.MatrixMHCSkip(iterations=0, **r),
    "matrix weights": lambda n, f, m, z, r: n.MatrixMHCSkip(**r).mixing_matrix(5),
    "shape of a state": lambda n, f, m, z, r: n.MHCSkip()(z(2, 3), [z(2, 4)]),
    "another batch": lambda n, f, m, z, r: n.MHCSkip()(z(2, 3), [z(4, 3)]),
    "shape in a matrix skip": lambda n, f, m, z, r: n.MatrixMHCSkip(**r)(z(2, 3), [z(2, 4)]),
    "modules": lambda n, f, m, z, r: n.MHCSequential(f),
    "option of a sequential": lambda n, f, m, z, r: n.MHCSequential([f], mode="mch"),
    "block": lambda n, f, m, z, r: n.MHCBasicBlock(3, 3, temperature=0.0, **r),
    "bottleneck": lambda n, f, m, z, r: n.MHCBottleneck(3, 3, mod="hc", **r),
    "streams": lambda n, f, m, z, r: n.HyperConnections(f, 3, streams=0),
    "width": lambda n, f, m, z, r: n.HyperConnections(f, 0),
    "number of streams": lambda n, f, m, z, r: n.HyperConnections(f, 3)(z(2, 3, 3)),
    "width of streams": lambda n, f, m, z, r: n.HyperConnections(f, 3)(z(2, 4, 5)),
    "head": lambda n, f, m, z, r: n.StreamHead(3, constraint="kron"),
    "width of a head": lambda n, f, m, z, r: n.StreamHead(0),
    "streams of a head": lambda n, f, m, z, r: n.StreamHead(3)(z(2, 3, 3)),
    "connection": lambda n, f, m, z, r: m.Decoder(sizes(m), "dense", **r),
    "connection of another kind": lambda n, f, m, z, r: m.Decoder(sizes(m), 3, **r),
    "residual options": lambda n, f, m, z, r: m.Decoder(sizes(m), "residual", mode="hc", **r),
    "other option": lambda n, f, m, z, r: m.Decoder(sizes(m), "streams", mode="hc", **r),
    "option of history": lambda n, f, m, z, r: m.Decoder(sizes(m), "history", temperature=0.0, **r),
    "widths of history": lambda n, f, m, z, r: m.Decoder(sizes(m), "history", auto_project=True, **r),
    "heads": lambda n, f, m, z, r: sizes(m, num_heads=3),
    "heads of keys": lambda n, f, m, z, r: sizes(m, num_heads=4, num_kv_heads=3),
    "odd heads": lambda n, f, m, z, r: sizes(m, head_dim=3),
    "no layers": lambda n, f, m, z, r: sizes(m, depth=0),
    "half a layer": lambda n, f, m, z, r: sizes(m, depth=0.5),
    "yes layers": lambda n, f, m, z, r: sizes(m, depth=True),
    "theta": lambda n, f, m, z, r: sizes(m, rope_theta=0.0),
    "epsilon": lambda n, f, m, z, r: sizes(m, norm_epsilon=-1.0),
    "config of a decoder": lambda n, f, m, z, r: m.Decoder(SIZES, **r),
    "other kind of checkpoint": lambda n, f, m, z, r: m.DecoderConfig.from_transformers({"model_type": "gpt2"}),
    "half a checkpoint": lambda n, f, m, z, r: m.DecoderConfig.from_transformers({"model_type": "llama"}),
    "scaling": lambda n, f, m, z, r: sizes(m, rope_scaling=2.0),
    "factor": lambda n, f, m, z, r: m.RopeScaling(factor=0.5),
    "frequencies": lambda n, f, m, z, r: m.RopeScaling(low_frequency=5.0),
    "length": lambda n, f, m, z, r: m.RopeScaling(length=0),
    "tied": lambda n, f, m, z, r: sizes(m, tied="yes"),
    "steps": lambda n, f, m, z, r: m.Decoder(sizes(m), **r).generate(None, 0),
    "temperature": lambda n, f, m, z, r: m.Decoder(sizes(m), **r).generate(None, 1, temperature=-1.0),
    "top_k": lambda n, f, m, z, r: m.Decoder(sizes(m), **r).generate(None, 1, top_k=6),
}


def refused(call):
    """Error and message, but for the way out (after the semicolon of shapes) and for fields of one package."""
    try:
        call()
    except Exception as error:
        message = str(error)
        if "history has a state" in message:
            message = message.split(";")[0]
        for field in TORCH_ALONE:
            message = message.replace(f"'{field}', ", "")
        return type(error), message
    return None


@pytest.mark.usefixtures("unchecked")  # it is our own refusals that are compared
@pytest.mark.parametrize("case", BAD)
def test_the_same_words(case):
    ours, theirs = map(refused, both(BAD[case]))
    assert ours is not None
    assert ours == theirs


@pytest.mark.usefixtures("unchecked")
def test_streams_of_a_stack():
    ours = refused(lambda: jax_nn.StreamStack(None, 1, 17, rngs=RNGS))
    assert ours == refused(lambda: torch_nn.StreamStack([], 17)) == refused(lambda: StreamConfig(17)) is not None

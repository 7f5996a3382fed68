"""Random SAEs as other projects would save them, each with that project's own formula written out plainly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 6, 18, 3
BLOCK = "unet.down_blocks.2.attentions.1"


@dataclasses.dataclass
class Foreign:
    """A folder's files, and what its project computes with them."""

    files: dict[str, Any]
    """By name: an object for JSON, tensors for safetensors, anything for a pickle."""
    encode: Callable[[Tensor], Tensor]
    """[N, D_IN] -> dense features [N, D_SAE]."""
    decode: Callable[[Tensor], Tensor]
    """[N, D_SAE] -> [N, D_IN]."""
    pre: Callable[[Tensor], Tensor]
    """[N, D_IN] -> what is selected among, less the threshold where there is one [N, D_SAE]."""
    k: int | None = None

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if name.endswith(".json"):
                (folder / name).write_text(json.dumps(content))
            elif name.endswith(".safetensors"):
                save_file({n: t.contiguous() for n, t in content.items()}, folder / name)
            elif isinstance(content, tuple):
                with (folder / name).open("wb") as file:
                    file.write(json.dumps(content[0]).encode() + b"\n")
                    torch.save(content[1], file)
            else:
                torch.save(content, folder / name)
        return folder

    def clear(self, x: Tensor) -> Tensor:
        """Rows of x whose selection does not hang on the last digit."""
        pre = self.pre(x)
        if self.k is None:
            return x[pre.abs().amin(1) > 1e-3]
        ranked = pre.sort(1, descending=True).values
        return x[ranked[:, self.k - 1] - ranked[:, self.k] > 1e-3]


def keep_top(values: Tensor, k: int) -> Tensor:
    best = values.topk(k, dim=1)
    return torch.zeros_like(values).scatter(1, best.indices, best.values)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sdxl_unbox(seed: int) -> Foreign:
    E, D = draw(seed, D_SAE, D_IN), draw(seed + 1, D_IN, D_SAE)
    pre_bias, latent_bias = draw(seed + 2, D_IN), draw(seed + 3, D_SAE)

    def pre(x: Tensor) -> Tensor:
        return (x - pre_bias) @ E.T + latent_bias

    state = {"encoder.weight": E, "decoder.weight": D, "pre_bias": pre_bias, "latent_bias": latent_bias}
    state["stats_last_nonzero"] = torch.zeros(D_SAE, dtype=torch.long)
    return Foreign(
        {
            "config.json": {"n_dirs_local": D_SAE, "d_model": D_IN, "k": K, "auxk": 4, "dead_steps_threshold": 9},
            "state_dict.pth": {"state_dict": state},
            "mean.pt": torch.linspace(0, 2, D_SAE),
        },
        encode=lambda x: keep_top(pre(x), K).relu(),
        decode=lambda z: z @ D.T + pre_bias,
        pre=pre,
        k=K,
    )


def openai_relu(seed: int) -> Foreign:
    unbox = sdxl_unbox(seed)
    state = unbox.files["state_dict.pth"]["state_dict"]
    counters = {"latents_activation_frequency": torch.ones(D_SAE), "latents_mean_square": torch.zeros(D_SAE)}
    files = {"state_dict.pt": {**state, **counters, "activation": "ReLU"}}
    return Foreign(files, lambda x: unbox.pre(x).relu(), unbox.decode, unbox.pre)


def openai_tied(seed: int) -> Foreign:
    """Tied weights are saved once more under the decoder's name, as the encoder has them."""
    theirs = openai_relu(seed)
    state = {**theirs.files["state_dict.pt"]}
    del state["decoder.weight"]
    E, bias = state["encoder.weight"], state["pre_bias"]
    return dataclasses.replace(
        theirs, files={"state_dict.pt": {**state, "decoder.linear.weight": E}}, decode=lambda z: z @ E + bias
    )


def openai_topk(seed: int) -> Foreign:
    """TopK as `state_dict()` of their library has it, trained without its normalisation: the config says so."""
    unbox = sdxl_unbox(seed)
    saved = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    state = {**unbox.files["state_dict.pth"]["state_dict"], **saved, "activation.k": K, "activation.postact_fn": "ReLU"}
    return dataclasses.replace(unbox, files={"config.json": {"k": K}, "state_dict.pt": state})


def latentsae(seed: int, **changes: Any) -> Foreign:
    """sparsify's tensors with a type of SAE: a Matryoshka encodes with the last k; a mean is taken off and put back."""
    mean = draw(seed + 4, D_IN)
    config = {"sae_type": "MATRYOSHKA", "k": 1, "matryoshka_sizes": f"2,9,{D_SAE}", "matryoshka_ks": f"1,2,{K}"}
    theirs = sparsify(seed)
    for name in ("activation", "skip_connection", "transcode"):
        del theirs.files["cfg.json"][name]
    theirs.files["cfg.json"] |= {**config, "mean_center": True, "use_skip": False, **changes}
    theirs.files["sae.safetensors"]["input_mean"] = mean
    return dataclasses.replace(
        theirs,
        encode=lambda x: sparsify(seed).encode(x - mean),
        decode=lambda z: theirs.decode(z) + mean,
        pre=lambda x: theirs.pre(x - mean),
    )


def sparsify(seed: int, **changes: Any) -> Foreign:
    E, W_dec = draw(seed, D_SAE, D_IN), draw(seed + 1, D_SAE, D_IN)
    bias, b_dec = draw(seed + 2, D_SAE), draw(seed + 3, D_IN)

    def pre(x: Tensor) -> Tensor:
        return (x - b_dec) @ E.T + bias

    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN, **changes,
    }  # fmt: skip
    return Foreign(
        {
            "cfg.json": config,
            "sae.safetensors": {"encoder.weight": E, "encoder.bias": bias, "W_dec": W_dec, "b_dec": b_dec},
        },
        encode=lambda x: keep_top(pre(x).relu(), K),
        decode=lambda z: z @ W_dec + b_dec,
        pre=pre,
        k=K,
    )


def dictionary_learning_linear(seed: int, dict_class: str, threshold: float) -> Foreign:
    """TopK, BatchTopK or plain ReLU, which share their tensors."""
    E, D = draw(seed, D_SAE, D_IN), draw(seed + 1, D_IN, D_SAE)
    bias, b_dec = draw(seed + 2, D_SAE), draw(seed + 3, D_IN)

    def pre(x: Tensor) -> Tensor:
        return (x - b_dec) @ E.T + bias

    state = {"encoder.weight": E, "encoder.bias": bias, "decoder.weight": D}
    if dict_class == "AutoEncoder":
        state["bias"] = b_dec
    else:
        state |= {"b_dec": b_dec, "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    norm = D.norm(dim=0) if dict_class == "AutoEncoder" else torch.ones(D_SAE)
    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "AutoEncoderTopK": lambda x: keep_top(pre(x).relu(), K),
        "BatchTopKSAE": lambda x: pre(x).relu() * (pre(x).relu() > threshold),
        "AutoEncoder": lambda x: pre(x).relu() * norm,
    }
    trainer = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 0}
    return Foreign(
        {"config.json": {"trainer": {**trainer, "submodule_name": BLOCK}, "buffer": {}}, "ae.pt": state},
        encode=encoders[dict_class],
        decode=lambda z: (z / norm) @ D.T + b_dec,
        pre=pre if dict_class == "AutoEncoderTopK" else lambda x: pre(x) - max(threshold, 0),
        k=K if dict_class == "AutoEncoderTopK" else None,
    )


def dictionary_learning_matryoshka(seed: int) -> Foreign:
    W_enc, W_dec = draw(seed, D_IN, D_SAE), draw(seed + 1, D_SAE, D_IN)
    b_enc, b_dec = draw(seed + 2, D_SAE), draw(seed + 3, D_IN)

    def pre(x: Tensor) -> Tensor:
        return (x - b_dec) @ W_enc + b_enc

    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "k": torch.tensor(K)}
    state |= {"threshold": torch.tensor(0.4), "group_sizes": torch.tensor([5, D_SAE - 5])}
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    return Foreign(
        {"config.json": {"trainer": {**trainer, "submodule_name": BLOCK}}, "ae.pt": state},
        encode=lambda x: pre(x).relu() * (pre(x).relu() > 0.4),
        decode=lambda z: z @ W_dec + b_dec,
        pre=lambda x: pre(x) - 0.4,
    )


def dictionary_learning_jumprelu(seed: int) -> Foreign:
    W_enc, W_dec = draw(seed, D_IN, D_SAE), draw(seed + 1, D_SAE, D_IN)
    b_enc, b_dec, threshold = draw(seed + 2, D_SAE), draw(seed + 3, D_IN), draw(seed + 4, D_SAE)

    def encode(x: Tensor) -> Tensor:
        pre = x @ W_enc + b_enc
        return (pre * (pre > threshold)).relu()

    trainer = {"dict_class": "JumpReluAutoEncoder", "activation_dim": D_IN, "dict_size": D_SAE}
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    return Foreign(
        {"config.json": {"trainer": {**trainer, "submodule_name": BLOCK}}, "ae.pt": state},
        encode=encode,
        decode=lambda z: z @ W_dec + b_dec,
        pre=lambda x: x @ W_enc + b_enc - threshold,
    )


def saelens(seed: int, architecture: str, *, centred: bool = True, rescaled: bool = False, **changes: Any) -> Foreign:
    W_enc, W_dec = draw(seed, D_IN, D_SAE), draw(seed + 1, D_SAE, D_IN)
    b_enc, b_dec, threshold = draw(seed + 2, D_SAE), draw(seed + 3, D_IN), draw(seed + 4, D_SAE)
    norm = W_dec.norm(dim=1) if rescaled else torch.ones(D_SAE)

    def pre(x: Tensor) -> Tensor:
        return ((x - b_dec if centred else x) @ W_enc + b_enc) * norm

    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "standard": lambda x: pre(x).relu(),
        "topk": lambda x: keep_top(pre(x), K).relu(),
        "jumprelu": lambda x: pre(x).relu() * (pre(x) > threshold.relu()),
    }
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    config: dict[str, Any] = {
        "architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": centred, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": BLOCK, "model_name": "some/model"},
    }  # fmt: skip
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": rescaled}
    if architecture == "jumprelu":
        tensors["threshold"] = threshold
    return Foreign(
        {"cfg.json": {**config, **changes}, "sae_weights.safetensors": tensors},
        encode=encoders[architecture],
        decode=lambda z: (z / norm) @ W_dec + b_dec,
        pre=(lambda x: pre(x) - threshold.relu()) if architecture == "jumprelu" else pre,
        k=K if architecture == "topk" else None,
    )


def saelens_matryoshka(seed: int, widths: Any = (4, 9)) -> Foreign:
    """Saved for inference it is a JumpReLU, and its widths are told beside."""
    theirs = saelens(seed, "jumprelu")
    config = theirs.files["cfg.json"]
    told = {"training_architecture_details": {"matryoshka_widths": list(widths), "k": K}}
    files = {**theirs.files, "cfg.json": {**config, "metadata": {**config["metadata"], **told}}}
    return dataclasses.replace(theirs, files=files)


def saelens_gated(seed: int, *, centred: bool = True) -> Foreign:
    theirs = saelens(seed, "standard", centred=centred)
    tensors, config = theirs.files["sae_weights.safetensors"], theirs.files["cfg.json"]
    b_gate, b_mag, r_mag = tensors["b_enc"], draw(seed + 5, D_SAE), 0.5 * draw(seed + 6, D_SAE)

    def magnitude(x: Tensor) -> Tensor:
        return (theirs.pre(x) - b_gate) * r_mag.exp() + b_mag

    kept = {name: tensor for name, tensor in tensors.items() if name != "b_enc"}
    return dataclasses.replace(
        theirs,
        files={
            "cfg.json": {**config, "architecture": "gated"},
            "sae_weights.safetensors": {**kept, "b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag},
        },
        encode=lambda x: magnitude(x).relu() * (theirs.pre(x) > 0),
        # Whether a feature fires hangs on the gate's sign, and on the magnitude's.
        pre=lambda x: torch.minimum(theirs.pre(x).abs(), magnitude(x).abs()),
    )


def saelens_checkpoint(seed: int, factor: float = 0.4) -> Foreign:
    """A BatchTopK in training: its threshold is one number, and a file beside says by what inputs are multiplied."""
    theirs = saelens(seed, "topk")
    config = {
        **theirs.files["cfg.json"],
        "architecture": "batchtopk",
        "normalize_activations": "expected_average_only_in",
    }
    tensors = {**theirs.files["sae_weights.safetensors"], "topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    scaler = {"scaling_factor": factor, "has_whitening": False}
    return dataclasses.replace(
        theirs,
        files={"cfg.json": config, "sae_weights.safetensors": tensors, "activation_scaler.json": scaler},
        encode=lambda x: theirs.pre(factor * x).relu() * (theirs.pre(factor * x) > 0.7),
        decode=lambda z: theirs.decode(z) / factor,
        pre=lambda x: theirs.pre(factor * x) - 0.7,
        k=None,
    )


def saelens_before_6(seed: int) -> Foreign:
    """Before version 6 everything was at the top level, and k an argument of the activation function."""
    new = saelens(seed, "topk")
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_name": BLOCK, "model_name": "x"}
    drop = {"k", "metadata", "rescale_acts_by_decoder_norm"}
    kept = {name: value for name, value in new.files["cfg.json"].items() if name not in drop}
    return dataclasses.replace(new, files={**new.files, "cfg.json": {**kept, **old}})


def saelens_of_activation(seed: int, **old: Any) -> Foreign:
    """Older still: a TopK was the activation function of a "standard" SAE, beside factors of 1."""
    theirs = saelens_before_6(seed)
    config = {**theirs.files["cfg.json"], "activation_fn_str": "topk", "architecture": "standard", **old}
    kept = {name: value for name, value in config.items() if value is not None}
    tensors = {**theirs.files["sae_weights.safetensors"], "scaling_factor": torch.ones(D_SAE)}
    return dataclasses.replace(theirs, files={"cfg.json": kept, "sae_weights.safetensors": tensors})


def llamascopium(seed: int, act_fn: str, *, rescaled: bool = True, norm: float | None = 5.0, **changes: Any) -> Foreign:
    """Selected among activations times their decoder row's norm; our TopK also tells them in that unit."""
    W_E, W_D = draw(seed, D_IN, D_SAE), draw(seed + 1, D_SAE, D_IN)
    b_E, b_D, log_threshold = draw(seed + 2, D_SAE), draw(seed + 3, D_IN), draw(seed + 4, D_SAE)
    factor = 1.0 if norm is None else D_IN**0.5 / norm
    scale = W_D.norm(dim=1) if rescaled else torch.ones(D_SAE)
    unit = scale if act_fn == "topk" else torch.ones(D_SAE)

    def pre(x: Tensor) -> Tensor:
        return (factor * x @ W_E + b_E) * scale

    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": lambda x: pre(x).relu() / scale,
        "jumprelu": lambda x: pre(x) * (pre(x) > log_threshold.exp()) / scale,
        "topk": lambda x: keep_top(pre(x).relu(), K) / scale,
    }
    config = {
        "sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "use_decoder_bias": True,
        "act_fn": act_fn, "norm_activation": "dataset-wise" if norm else "inference", "top_k": K,
        "sparsity_include_decoder_norm": rescaled, "use_triton_kernel": False, "jumprelu_threshold_window": 2.0,
        "hook_point_in": BLOCK, "hook_point_out": BLOCK, "use_glu_encoder": False, **changes,
    }  # fmt: skip
    state = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": b_D}
    if act_fn == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = log_threshold
    if norm is not None:
        state[f"dataset_average_activation_norm.{BLOCK}"] = torch.tensor(norm)
    return Foreign(
        {"config.json": config, "sae_weights.safetensors": state},
        encode=lambda x: encoders[act_fn](x) * unit,
        decode=lambda z: (z / unit @ W_D + b_D) / factor,
        pre=(lambda x: pre(x) - log_threshold.exp()) if act_fn == "jumprelu" else pre,
        k=K if act_fn == "topk" else None,
    )


def overcomplete(seed: int, kind: str, encoder: str | None = "encoder.final_block.0") -> Foreign:
    """Nothing is centred; rows are normalised when they are used; thresholds are logarithms; k is not in the state."""
    rows, bias, thresholds = draw(seed + 1, D_SAE, D_IN), draw(seed + 2, D_SAE), draw(seed + 4, D_SAE)
    D = rows / (rows.norm(dim=1, keepdim=True) + 1e-8) * torch.tensor(0.3).exp()
    E = D if encoder is None else draw(seed, D_SAE, D_IN)

    def pre(x: Tensor) -> Tensor:
        return x @ E.T + bias

    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "SAE": lambda x: pre(x).relu(),
        "TopKSAE": lambda x: keep_top(pre(x).relu(), K),
        "JumpSAE": lambda x: pre(x).relu() * (pre(x).relu() > thresholds.exp()),
    }
    state = {"dictionary._weights": rows, "dictionary.multiplier": torch.tensor(0.3)}
    if encoder is None:
        state |= {
            "encoder.bias": bias,
            "encoder.tied_to._weights": rows,
            "encoder.tied_to.multiplier": torch.tensor(0.3),
        }
    else:
        state |= {f"{encoder}.weight": E, f"{encoder}.bias": bias}
    if kind == "JumpSAE":
        state["thresholds"] = thresholds
    return Foreign(
        {"config.json": {"class": kind, **({"top_k": K} if kind == "TopKSAE" else {})}, "state_dict.pt": state},
        encode=encoders[kind],
        decode=lambda z: z @ D,
        pre=(lambda x: pre(x) - thresholds.exp()) if kind == "JumpSAE" else pre,
        k=K if kind == "TopKSAE" else None,
    )


def saev(seed: int, schema: int | None, activation: str = "Relu") -> Foreign:
    """A line of JSON, then tensors. Release 0.1 writes no schema, and centres."""
    W_enc, W_dec = draw(seed, D_IN, D_SAE), draw(seed + 1, D_SAE, D_IN)
    b_enc, b_dec = draw(seed + 2, D_SAE), draw(seed + 3, D_IN)

    def pre(x: Tensor) -> Tensor:
        return (x - b_dec if schema is None else x) @ W_enc + b_enc

    settings = {"d_vit": D_IN, "exp_factor": D_SAE // D_IN, "n_reinit_samples": 9, "normalize_w_dec": True, "seed": 0}
    told: dict[str, Any] = {**settings, "sparsity_coeff": 4e-4, "ghost_grads": False}
    if schema is not None:
        activated = {"cls": activation, "params": {} if activation == "Relu" else {"top_k": K}}
        told = {"schema": schema, "cfg": {**settings, "activation": activated}, "commit": "x", "lib": "0.2"}
    return Foreign(
        {"sae.pt": (told, {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec})},
        encode=lambda x: pre(x).relu(),
        decode=lambda z: z @ W_dec + b_dec,
        pre=pre,
    )


KINDS: dict[str, Callable[[int], Foreign]] = {
    "sdxl-unbox": sdxl_unbox,
    "openai": openai_relu,
    "openai, tied": openai_tied,
    "sdxl-unbox, of OpenAI's TopK": openai_topk,
    "sparsify": sparsify,
    "sparsify, by expansion factor": lambda seed: sparsify(seed, num_latents=0, expansion_factor=D_SAE // D_IN),
    "sparsify, by latentsae": latentsae,
    "dictionary_learning TopK": lambda seed: dictionary_learning_linear(seed, "AutoEncoderTopK", -1.0),
    "dictionary_learning BatchTopK": lambda seed: dictionary_learning_linear(seed, "BatchTopKSAE", 0.4),
    "dictionary_learning ReLU": lambda seed: dictionary_learning_linear(seed, "AutoEncoder", 0.0),
    "dictionary_learning Matryoshka": dictionary_learning_matryoshka,
    "dictionary_learning JumpReLU": dictionary_learning_jumprelu,
    "saelens standard": lambda seed: saelens(seed, "standard"),
    "saelens topk": lambda seed: saelens(seed, "topk"),
    "saelens topk, rescaled": lambda seed: saelens(seed, "topk", rescaled=True),
    "saelens topk, rescaled, not centred": lambda seed: saelens(seed, "topk", rescaled=True, centred=False),
    "saelens jumprelu": lambda seed: saelens(seed, "jumprelu"),
    "saelens jumprelu, not centred": lambda seed: saelens(seed, "jumprelu", centred=False),
    "saelens Matryoshka": saelens_matryoshka,
    "saelens gated": saelens_gated,
    "saelens gated, not centred": lambda seed: saelens_gated(seed, centred=False),
    "saelens checkpoint of BatchTopK": saelens_checkpoint,
    "saelens before 6": saelens_before_6,
    "saelens standard, of TopK": saelens_of_activation,
    "saelens of no architecture, of TopK": lambda seed: saelens_of_activation(
        seed, architecture=None, activation_fn_str=None, activation_fn="topk"
    ),
    "llamascopium relu": lambda seed: llamascopium(seed, "relu"),
    "llamascopium jumprelu": lambda seed: llamascopium(seed, "jumprelu"),
    "llamascopium jumprelu, not rescaled": lambda seed: llamascopium(seed, "jumprelu", rescaled=False, norm=None),
    "llamascopium topk": lambda seed: llamascopium(seed, "topk"),
    "llamascopium topk, not rescaled": lambda seed: llamascopium(seed, "topk", rescaled=False),
    "overcomplete SAE": lambda seed: overcomplete(seed, "SAE"),
    "overcomplete TopKSAE": lambda seed: overcomplete(seed, "TopKSAE"),
    "overcomplete TopKSAE, untied": lambda seed: overcomplete(seed, "TopKSAE", "encoder"),
    "overcomplete TopKSAE, tied": lambda seed: overcomplete(seed, "TopKSAE", None),
    "overcomplete JumpSAE": lambda seed: overcomplete(seed, "JumpSAE"),
    "saev": lambda seed: saev(seed, None),
    "saev, of a schema": lambda seed: saev(seed, 2),
}

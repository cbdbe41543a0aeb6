"""chunked_ce.py with transformers, PEFT, accelerate, TRL, DDP and FSDP2: what stock gives."""

import contextlib
import copy
import functools
import inspect
import io
import itertools
import json
import math
import pickle
import pydoc_data.topics

import accelerate
import bitsandbytes as bnb
import datasets
import numpy as np
import peft
import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import chunked_ce as script
from chunked_ce import head_arguments, linear_cross_entropy, patch_causal_lm

torch.set_num_threads(1)  # tests run beside each other
IGNORE, VOCAB = -100, 256
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 1,
         "bos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512,
         "attn_implementation": "eager"}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
MAMBA = {"lm_head_multiplier": 0.5, "mamba_chunk_size": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4,
         "mamba_d_head": 16, "mamba_d_state": 16}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Qwen2": {"tie_word_embeddings": True}, "Qwen3": {}, "Mistral": {}, "Phi3": {},
    "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0}, "GPTNeoX": {},
    "Gemma2": {"final_logit_softcapping": 5.0}, "FalconH1": MAMBA,
    "Olmo2": {}, "StableLm": {}, "Bloom": {}, "Mixtral": EXPERTS, "GptOss": EXPERTS,
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "GPT2": {**GPT2, "embd_pdrop": 0.0},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 64, **NO_DROPOUT},
    "Llama4": {"num_local_experts": 2, "intermediate_size_mlp": 128}, "Llava": {}}  # fmt: skip
CAPS = {"Cohere": "logit_scale", "Granite": "logits_scaling", "Gemma2": "final_logit_softcapping"}
CLASSES = {"Llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
           "GPT2": ("GPT2Config", "GPT2LMHeadModel")}  # fmt: skip
IMAGE = 255  # the token of an image


def tiny(kind="Llama", **options):
    """A small model of a family, random weights, in training."""
    torch.manual_seed(0)
    if kind == "Llava":
        vision = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=16, patch_size=8, projection_dim=32)  # fmt: skip
        text = transformers.LlamaConfig(**SIZES)
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE
        )
        return transformers.LlavaForConditionalGeneration(config).train()
    config, model = CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    config = getattr(transformers, config)(**SIZES | FAMILIES.get(kind, {}) | options)
    return getattr(transformers, model)(config).train()


def batch(rows=2, length=24, share=0.3, vocab=VOCAB - 1):
    """input_ids and labels, a share of which does not count."""
    torch.manual_seed(1)
    ids = torch.randint(3, vocab, (rows, length))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(rows, length) < share, IGNORE)}


def lora(model, targets=("lm_head", "q_proj"), **options):
    """LoRA with weights that change what the model says."""
    options = {"r": 4, "target_modules": list(targets), "init_lora_weights": False} | options
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(**options)).train()


def step(model, **inputs):
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_near(ours, want, limit=1e-4):
    """In relative norm, each; of a gradient that is rounding alone by the others' norms."""
    norms = torch.stack([t.double().norm() for t in want])
    assert len(ours) == len(want) > 0 and norms.max() > 0
    assert (norms > 0).double().mean() > 0.8, "gradients of 0"
    floor = 1e-3 * norms.median()
    for k, (got, exact) in enumerate(zip(ours, want, strict=True)):
        error = (got.double() - exact.double()).norm()
        assert error <= limit * max(norms[k], floor), (k, error.item(), norms[k].item())


def stock_and_patched(model, inputs, **options):
    """A step of the model as it is, then one patched: the same."""
    want = step(model, **inputs)
    assert model(**inputs).logits is not None
    patch_causal_lm(model, **options)
    assert model(**inputs).logits is None
    ours = step(model, **inputs)
    assert_near(ours, want)
    return ours


@contextlib.contextmanager
def refused(*words):
    """A ValueError of one line that says these words."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    assert all(word in message for word in words), message


@pytest.fixture
def given_batch():
    return batch()


# ---- Families


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_family_has_the_stock_loss_and_gradients(kind, wrap):
    model, inputs = tiny(kind), batch()
    if wrap:
        names = [n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        model = lora(model, {head.split(".")[-1], *({"q_proj", "query_key_value"} & {*names})})
    shifted = F.pad(inputs["labels"], (0, 1), value=IGNORE)[:, 1:].contiguous()
    padding = torch.ones_like(shifted)
    padding[1, :5] = 0
    ways = [{}, {"num_items_in_batch": torch.tensor(20)}, {"num_items_in_batch": 7},
            {"shift_labels": shifted.roll(1, 0)}, {"attention_mask": padding}]  # fmt: skip
    want = [step(model, **inputs, **way) for way in ways]
    patch_causal_lm(model)
    for way, exact in zip(ways, want, strict=True):
        assert_near(step(model, **inputs, **way), exact)
    losses = [exact[0].item() for exact in want[:4]]
    assert len({round(loss, 4) for loss in losses}) == 4, losses  # each option was heard
    out = model(**inputs)
    assert out.logits is None and model(input_ids=inputs["input_ids"]).logits is not None


def test_images_reach_the_loss():
    inputs = batch()
    inputs["input_ids"][:, 2:6] = IMAGE  # 4 patches
    inputs["labels"][:, 2:6] = IGNORE
    model = tiny("Llava")
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    ours = stock_and_patched(model, inputs | pixels)
    other = step(model, **inputs, pixel_values=torch.randn(2, 3, 16, 16))
    assert ours[0] != other[0]
    vision = model.model.vision_tower.parameters()
    assert sum(p.grad.abs().sum() for p in vision if p.grad is not None) > 0


def test_packed_sequences_stay_apart():
    inputs = batch()
    places = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    ours = stock_and_patched(tiny(), {**inputs, "position_ids": places, "use_cache": False})
    assert (ours[0] - step(tiny(), **inputs)[0]).abs() > 1e-4  # without them it is one text


@pytest.mark.parametrize("options", [{"inputs_embeds": True}, {"checkpointing": True}])
def test_embeddings_and_checkpointing(options, given_batch):
    model = tiny()
    if "checkpointing" in options:
        model.gradient_checkpointing_enable()
    else:
        given_batch["inputs_embeds"] = model.model.embed_tokens(given_batch.pop("input_ids"))
        given_batch["inputs_embeds"] = given_batch["inputs_embeds"].detach().requires_grad_()
    stock_and_patched(model, given_batch)
    if "inputs_embeds" in given_batch:
        assert given_batch["inputs_embeds"].grad.norm() > 0


def test_autocast_and_bfloat16_models(given_batch):
    for model, enabled in ((tiny(), True), (tiny().bfloat16(), False)):
        results = []
        for patched in (False, True):
            patch_causal_lm(model) if patched else None
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(step(model, **given_batch))
        assert_near(*results[::-1], 3e-2)


@pytest.mark.parametrize("name", ["Bert", "T5", "Bart", "no head", "classifier"])
def test_other_models_are_refused(name):
    sizes = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    if name == "Bert":
        config = transformers.BertConfig(vocab_size=VOCAB, num_hidden_layers=1, is_decoder=True)
        model = transformers.BertLMHeadModel(config)
    elif name == "T5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, d_ff=64))
    elif name == "Bart":
        layers = {"encoder_layers": 1, "decoder_layers": 1}
        config = transformers.BartConfig(vocab_size=VOCAB, d_model=32, **layers)
        model = transformers.BartForConditionalGeneration(config)
    elif name == "classifier":
        model = transformers.LlamaForSequenceClassification(tiny().config)
    else:
        model = tiny().model
    kind = type(model)
    with refused(kind.__name__):
        patch_causal_lm(model)
    assert type(model) is kind  # left as it was


pick = st.sampled_from


@given(pick(["Llama", "Gemma2", "Cohere", "Granite"]), pick([2, 37, 256]), st.booleans(),
       pick([0.5, 5.0]), pick([(1, 2), (2, 9), (3, 24)]), pick([None, 7, torch.tensor(20)]),
       st.booleans(), pick([0.0, 0.5]), pick([None, 1, 8]), st.integers(0, 99))  # fmt: skip
def test_any_head_and_labels(kind, vocab, tied, cap, shape, items, shifted, share, chunk, seed):
    options = {"vocab_size": vocab, "tie_word_embeddings": tied, "num_hidden_layers": 1}
    options |= {CAPS[kind]: cap} if kind in CAPS else {}
    model = tiny(kind, **options, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    torch.manual_seed(seed)
    ids = torch.randint(0, vocab, shape)
    labels = ids.masked_fill(torch.rand(shape) < share, IGNORE)
    labels[:, -1] = ids[:, -1]  # stock's loss of none that counts is nan
    inputs = {"input_ids": ids, "labels": labels}
    inputs |= {} if items is None else {"num_items_in_batch": items}
    if shifted:
        inputs["shift_labels"] = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].contiguous()
    stock_and_patched(model, inputs, loss=functools.partial(linear_cross_entropy, chunk=chunk))


# ---- Evaluation, Trainer, generation


def run_trainer(model, path, rows=6, **options):
    """A Trainer over rows of a batch."""
    hooks = {k: options.pop(k) for k in ("compute_metrics", "preprocess_logits_for_metrics")
             if k in options}  # fmt: skip
    inputs = batch(rows)
    data = [{name: tensor[k] for name, tensor in inputs.items()} for k in range(rows)]
    arguments = transformers.TrainingArguments(
        str(path), use_cpu=True, report_to=[], per_device_train_batch_size=2, logging_steps=1,
        per_device_eval_batch_size=4, save_strategy="no", max_steps=4, learning_rate=1e-2,
        disable_tqdm=True, **options)  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, **hooks)


def logged(trainer):
    """(loss, norm of the gradients) of each step."""
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Cohere"])
def test_evaluation_is_the_models_own(kind, given_batch):
    model = tiny(kind).eval()
    want = model(**given_batch)
    out = patch_causal_lm(model)(**given_batch)
    assert torch.equal(out.logits, want.logits) and torch.equal(out.loss, want.loss)
    assert [*out.keys()] == [*want.keys()]
    kept = model(**given_batch | {"labels": None}, logits_to_keep=1).logits
    assert torch.allclose(kept, want.logits[:, -1:], atol=1e-5)


def test_without_return_dict(given_batch):
    model, other = patch_causal_lm(tiny()), patch_causal_lm(tiny(), eval_logits=False)
    loss, logits, *rest = model(**given_batch, return_dict=False)
    want = tiny()(**given_batch)
    assert logits is None and loss.requires_grad and len(rest) == 1  # past_key_values
    assert_near([loss], [want.loss])
    stock = tiny().eval()(**given_batch, return_dict=False)
    assert all(torch.equal(*pair) for pair in zip(
        model.eval()(**given_batch, return_dict=False)[:2], stock[:2], strict=True))  # fmt: skip
    found = other.eval()(**given_batch, return_dict=False)[1]
    assert torch.equal(found, want.logits.argmax(-1))
    model.config.return_dict = False
    assert isinstance(model.train()(**given_batch), tuple)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Cohere", "GPTNeoX"])
def test_predictions_in_place_of_logits(kind, given_batch):
    model = tiny(kind).eval()
    want = model(**given_batch)
    patch_causal_lm(model, eval_logits=False)
    out = model(**given_batch)
    assert out.logits is None and "logits" not in out
    assert torch.equal(out.predictions, want.logits.argmax(-1))
    assert_near([out.loss], [want.loss])
    assert "predictions" not in model.train()(**given_batch)
    assert torch.equal(model.eval()(input_ids=given_batch["input_ids"]).logits, want.logits)


def test_trainer_evaluates_as_with_stock(tmp_path):
    def metrics(found):
        return {"mean": float(np.mean(found.predictions)), "size": found.predictions.size}

    results = []
    for model in (tiny(), patch_causal_lm(tiny())):
        trainer = run_trainer(model, tmp_path, compute_metrics=metrics)
        argmax = run_trainer(model, tmp_path, compute_metrics=metrics,
                             preprocess_logits_for_metrics=lambda x, y: x.argmax(-1))  # fmt: skip
        found = trainer.predict(trainer.eval_dataset)
        results.append((found, trainer.evaluate(), argmax.evaluate()))
    (want, *evaluations), (got, *others) = results
    assert got.predictions.shape == (6, 24, VOCAB)
    assert np.array_equal(got.predictions, want.predictions)
    assert got.metrics["test_loss"] == want.metrics["test_loss"]
    for one, other in zip(evaluations, others, strict=True):
        names = "eval_loss", "eval_mean", "eval_size"
        assert [one[name] for name in names] == [other[name] for name in names]

    model = patch_causal_lm(tiny(), eval_logits=False)
    trainer = run_trainer(model, tmp_path, compute_metrics=metrics)
    found = trainer.predict(trainer.eval_dataset)
    assert np.array_equal(found.predictions, want.predictions.argmax(-1))
    assert abs(found.metrics["test_loss"] - want.metrics["test_loss"]) < 1e-5
    assert trainer.evaluate()["eval_size"] == 6 * 24


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3},
                                     {"label_smoothing_factor": 0.1}], ids=str)  # fmt: skip
def test_trainer_trains_as_with_stock(options, tmp_path):
    stock, ours = tiny(), patch_causal_lm(tiny())
    want, got = (logged(run_trainer(model, tmp_path, **options)) for model in (stock, ours))
    assert len(want) == 4 and want[-1][0] < want[0][0]
    assert np.allclose(got, want, rtol=1e-4)
    assert_near([*ours.state_dict().values()], [*stock.state_dict().values()], 1e-3)


def test_generation(given_batch):
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = tiny().eval().generate(given_batch["input_ids"], **options)
    for eval_logits in (True, False):
        model = patch_causal_lm(tiny(), eval_logits=eval_logits).eval()
        assert torch.equal(model.generate(given_batch["input_ids"], **options), want)
    assert want.shape[1] > 24


# ---- A patched model that changes afterwards


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_on_the_head_are_refused(register, given_batch):
    model = patch_causal_lm(tiny())
    handle = getattr(model.lm_head, register)(lambda *_: None)
    with refused("head", "hook"):
        model(**given_batch)
    with refused("head", "hook"):
        head_arguments(model)
    handle.remove()
    assert model(**given_batch).loss.requires_grad


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_heads_are_refused(given_batch):
    def layer4bit():
        return bnb.nn.Linear4bit(64, VOCAB, bias=False, compute_dtype=torch.float32)

    heads = {"Doubled": Doubled(64, VOCAB, bias=False), "Linear4bit": layer4bit()}
    heads["Sequential"] = nn.Sequential(nn.Linear(64, VOCAB))
    for name, head in heads.items():
        model = patch_causal_lm(tiny())
        model.lm_head = head
        with refused("head", name):
            model(**given_batch)
        model = tiny()
        model.lm_head = head
        with refused("head", name):
            patch_causal_lm(model)


def test_replaced_forwards_are_refused(given_batch):
    model = patch_causal_lm(tiny())
    model.lm_head.forward = lambda x: x @ torch.randn(64, VOCAB)
    with refused("head"):
        model(**given_batch)
    model = tiny()
    model.forward = functools.partial(type(model).forward, model)
    with refused("forward"):
        patch_causal_lm(model)


def test_other_linear_heads_are_honoured(given_batch):
    ours, stock = patch_causal_lm(tiny()), tiny()
    for model in (ours, stock):
        torch.manual_seed(3)
        model.resize_token_embeddings(300)
    given_batch["labels"][:, 5] = 299
    assert_near(step(ours, **given_batch), step(stock, **given_batch))
    assert ours.lm_head.weight.grad.shape == (300, 64)
    for model in (ours, stock):
        torch.manual_seed(4)
        model.lm_head = nn.Linear(64, 300)  # with a bias
    assert_near(step(ours, **given_batch), step(stock, **given_batch))
    assert ours.lm_head.bias.grad.norm() > 0


def test_a_changed_loss_function(given_batch):
    def loss(logits, labels, vocab_size, **_):
        return 3 * F.cross_entropy(logits[0, :-1], labels[0, 1:])

    model = patch_causal_lm(tiny())
    model.loss_function = loss
    with refused("loss_function"):
        model(**given_batch)
    stock = tiny()
    stock.loss_function = loss
    assert torch.equal(model.eval()(**given_batch).loss, stock.eval()(**given_batch).loss)
    with refused("LlamaForCausalLM", "loss"):
        patch_causal_lm(stock)
    model = patch_causal_lm(stock, check=False)  # at one's own risk
    assert_near([model.train()(**given_batch).loss], [tiny()(**given_batch).loss])


def test_a_loss_of_ones_own(given_batch):
    seen = []

    def loss(hidden, **arguments):
        seen.append({*arguments})
        return linear_cross_entropy(hidden, **arguments, z_loss=0.1)

    model = patch_causal_lm(tiny(), loss=loss)
    got, stock = model(**given_batch).loss, tiny()
    logits = stock(**given_batch).logits[:, :-1]
    live = given_batch["labels"][:, 1:] != IGNORE
    extra = (0.1 * logits.logsumexp(-1) ** 2)[live].mean()
    assert_near([got], [stock(**given_batch).loss + extra])
    names = "labels", "ignore_index", "num_items", "weight", "bias", "softcap", "logit_scale"
    assert seen == [{*names}]


def test_what_needs_logits_is_refused(given_batch):
    model = patch_causal_lm(tiny())
    with refused("logits_to_keep"):
        model(**given_batch, logits_to_keep=3)
    with refused("logits_to_keep"):
        model(**given_batch, logits_to_keep=torch.arange(24).repeat(9))
    assert model(**given_batch, logits_to_keep=0).loss.requires_grad
    assert model(input_ids=given_batch["input_ids"], logits_to_keep=3).logits.shape[1] == 3
    model = patch_causal_lm(tiny("Mixtral"))
    with refused("output_router_logits"):
        model(**given_batch, output_router_logits=True)
    model.config.output_router_logits = True
    for unsaid in ({}, {"output_router_logits": None}):
        with refused("output_router_logits"):
            model(**given_batch, **unsaid)
    assert model.eval()(**given_batch).aux_loss > 0


def test_hooks_below_an_adapter_are_refused():
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with refused("the head", "hook"):
        patch_causal_lm(lora(model))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_failed_check_leaves_the_model_as_it_was(hooked, given_batch):
    model = tiny()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    if hooked:
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    for _ in range(2):
        with refused("loss"):
            patch_causal_lm(model)
        assert type(model) is transformers.LlamaForCausalLM
        assert model(**given_batch).logits is not None


def test_offloaded_heads_are_refused(given_batch):
    model = patch_causal_lm(tiny())
    model.lm_head.to("meta")
    with refused("head", "offloaded"):
        model(**given_batch)
    model = accelerate.cpu_offload(patch_causal_lm(tiny()), torch.device("cpu"))
    with refused("head"):
        model(**given_batch)


# ---- PEFT


def two_adapters(**options):
    """A model with adapters `default` and `other`, both of which say something else."""
    model = lora(tiny(), **options)
    torch.manual_seed(5)
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("options", [{}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}],
                         ids=["lora", "modules_to_save"])  # fmt: skip
@pytest.mark.parametrize("first", [False, True], ids=["patched_last", "patched_first"])
def test_adapters_are_switched(options, first, given_batch):
    def states(model):
        yield step(model, **given_batch)
        with model.disable_adapter():
            yield [model(**given_batch).loss.detach()]
        model.set_adapter("other")
        yield step(model, **given_batch)
        if not options:
            model.base_model.set_adapter(["default", "other"])
            yield step(model, **given_batch)
        model.set_adapter("default")
        yield step(model, **given_batch)

    want, ours = [*states(two_adapters(**options))], two_adapters(**options)
    if first:  # the base, then adapters around it
        base = patch_causal_lm(tiny())
        ours = peft.get_peft_model(base, ours.peft_config["default"]).train()
        ours.add_adapter("other", ours.peft_config["default"])
        ours.load_state_dict(two_adapters(**options).state_dict())
    else:
        patch_causal_lm(ours)
    got = [*states(ours)]
    for pair in zip(got, want, strict=True):
        assert_near(*pair)
    assert len({round(state[0].item(), 5) for state in want}) == len(want) - 1  # the first is last
    assert ours(**given_batch).logits is None


def test_merged_adapters(given_batch):
    model, stock = patch_causal_lm(lora(tiny())), lora(tiny())
    results = []
    for name in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
        found = [getattr(each, name)() for each in (model, stock)]
        if name == "merge_and_unload":
            model, stock = found
        assert_near([model(**given_batch).loss], [stock(**given_batch).loss])
        results.append(model(**given_batch).loss.item())
    assert np.allclose(results, results[0], rtol=1e-4) and model(**given_batch).logits is None


def test_merged_adapters_that_are_switched_off():
    model = lora(tiny())
    weight = model.get_base_model().lm_head.base_layer.weight.detach().clone()
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(script.head_arguments(model)["weight"], weight)


def test_mixed_batches_of_adapters(given_batch):
    names = {"adapter_names": ["default", "other"]}
    stock, ours = two_adapters().eval(), patch_causal_lm(two_adapters()).eval()
    want = stock(**given_batch, **names)
    assert torch.equal(ours(**given_batch, **names).logits, want.logits)
    assert not torch.allclose(want.logits, stock(**given_batch).logits)
    patch_causal_lm(ours, eval_logits=False)
    with refused("head", "hook"):
        ours(**given_batch, **names)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True},
                                     {"lora_bias": True, "targets": ["lm_head"]}],
                         ids=str)  # fmt: skip
def test_adapters_that_do_more_are_refused(options, given_batch):
    def make():
        model = tiny()
        model.lm_head = nn.Linear(64, VOCAB)  # with a bias, for lora_bias
        return model

    model = lora(make(), **options)
    with refused("head", "LoRA"):
        head_arguments(model)
    with refused("head"):
        patch_causal_lm(model)
    model = lora(patch_causal_lm(make()), **options)
    with refused("head", "LoRA"):
        model(**given_batch)
    with model.disable_adapter():
        assert model(**given_batch).loss.requires_grad is False


def test_other_kinds_of_adapters_are_refused(given_batch):
    config = peft.LoHaConfig(r=2, target_modules=["lm_head"], init_weights=False)
    model = peft.get_peft_model(patch_causal_lm(tiny()), config).train()
    with refused("head", "adapter"):
        model(**given_batch)
    model = lora(patch_causal_lm(tiny(), eval_logits=False), lora_dropout=0.1).eval()
    assert_near([model(**given_batch).loss], [lora(tiny()).eval()(**given_batch).loss])


# ---- Copies, pickles, replicas, hooks of accelerate


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
          "save": saved_and_loaded}  # fmt: skip


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "lora"])
def test_copies_are_patched_and_have_their_own_weights(way, wrap, given_batch):
    model = patch_causal_lm(lora(tiny("Gemma2")) if wrap else tiny("Gemma2"), eval_logits=False)
    want = step(model, **given_batch)
    twin = COPIES[way](model)
    assert type(twin) is type(model) and twin(**given_batch).logits is None
    assert_near(step(twin, **given_batch), want, 1e-6)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert abs(twin(**given_batch).loss.item() - math.log(VOCAB)) < 1e-4
    assert_near(step(model, **given_batch), want, 1e-6)
    assert twin.eval()(**given_batch).predictions.shape == (2, 24)


def test_saved_checkpoints_are_stock(tmp_path, given_batch):
    model = patch_causal_lm(tiny())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded) is transformers.LlamaForCausalLM
    assert_near([model(**given_batch).loss], [loaded(**given_batch).loss])
    assert type(model).from_pretrained(tmp_path).lm_head.weight.equal(model.lm_head.weight)


def test_the_patch_is_done_once(given_batch):
    model = tiny()
    kind = type(model)
    patch_causal_lm(model)
    once = type(model)
    assert patch_causal_lm(model) is model and type(model) is once and isinstance(model, kind)
    assert once.__name__ == kind.__name__ and once.__module__ == kind.__module__
    assert model(**given_batch).logits is None


def test_the_signature_is_kept(given_batch):
    model = patch_causal_lm(tiny())
    names = [*inspect.signature(transformers.LlamaForCausalLM.forward).parameters][1:]
    assert [*inspect.signature(model.forward).parameters] == names
    places = [given_batch.get(name) for name in names[: names.index("labels") + 1]]
    out = model(*places)
    assert out.logits is None
    assert_near([out.loss], [tiny()(*places).loss])


def test_checking_leaves_modes_and_generators(given_batch):
    model = tiny()
    model.model.layers[0].eval()
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    patch_causal_lm(model)
    assert torch.equal(torch.rand(1), want)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(p.grad is None for p in model.parameters())


def test_4bit_weights_stay_trainable():
    model = tiny().bfloat16()
    attention = model.model.layers[0].self_attn
    plain = attention.q_proj
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(plain.state_dict())
    attention.q_proj = layer.to("cpu")
    patch_causal_lm(model.eval())
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_replicas_of_data_parallel(given_batch):
    model = patch_causal_lm(tiny())
    replica = model._replicate_for_data_parallel()
    assert replica(**given_batch).logits is None
    replica._modules = dict(replica._modules)
    replica.lm_head = nn.Linear(64, VOCAB, bias=False)
    replica.lm_head.weight.data.zero_()
    assert abs(replica(**given_batch).loss.item() - math.log(VOCAB)) < 1e-4  # its own head
    assert_near([model(**given_batch).loss], [tiny()(**given_batch).loss])


@pytest.mark.parametrize("first", [False, True], ids=["dispatched_first", "patched_first"])
@pytest.mark.parametrize("split", [{"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_hooks_of_accelerate(first, split, given_batch):
    def dispatched(model):
        return accelerate.dispatch_model(model, split, force_hooks=True)

    model = dispatched(patch_causal_lm(tiny())) if first else patch_causal_lm(dispatched(tiny()))
    assert hasattr(model, "_hf_hook")
    assert model(**given_batch).logits is None
    assert_near(step(model, **given_batch), step(tiny(), **given_batch))
    want = tiny().eval()(**given_batch).logits
    assert torch.equal(model.eval()(**given_batch).logits, want)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("way", ["replicas", "split"])
def test_two_gpus(way):
    inputs = {name: tensor.cuda() for name, tensor in batch(4, share=0.0).items()}
    want, model = step(tiny().cuda(), **inputs), tiny()
    if way == "split":
        first = "model.embed_tokens", "model.rotary_emb", "model.layers.0"
        second = "model.layers.1", "model.norm", "lm_head"
        split = dict.fromkeys(first, 0) | dict.fromkeys(second, 1)
        run = patch_causal_lm(accelerate.dispatch_model(model, split))
    else:
        run = nn.DataParallel(patch_causal_lm(model.cuda()))
    loss = run(**inputs, use_cache=False).loss.mean()
    loss.backward()
    ours = [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]
    assert_near(ours, [t.cpu() for t in want])


# ---- Training curves


def curve(model, batches, rate, parts=1):
    """The loss of each step in bf16 autocast, a batch taken in `parts`."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate), torch.zeros(len(batches))
    for k, ids in enumerate(batches):
        for part in ids.chunk(parts):
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss / parts
            loss.backward()
            losses[k] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def compare_curves(make, batches, rate):
    """Stock, stock with sums in another order (half batches), patched: it may differ as much."""
    stock, halves = curve(make(), batches, rate), curve(make(), batches, rate, 2)
    ours = curve(patch_causal_lm(make()), batches, rate)
    noise, difference = (stock - halves).abs().max(), (stock - ours).abs().max()
    assert stock[-1] < stock[0] - 0.5, "it does not learn"
    assert difference <= 3 * noise + 1e-3, (difference.item(), noise.item())


def text(steps, rows, length):
    """Batches of English, a token a byte."""
    data = "".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    torch.manual_seed(6)
    starts = torch.randint(0, len(data) - length, (steps * rows,)).tolist()
    found = [list(data[start : start + length]) for start in starts]
    return torch.tensor(found).view(steps, rows, length)


def test_it_learns_as_stock_does():
    compare_curves(tiny, text(25, 4, 48), 5e-3)


@pytest.mark.gpu(gib=60)
def test_llama_1b_learns_as_stock_does():
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
             "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
             "tie_word_embeddings": True}  # fmt: skip
    with torch.device("cuda"):  # the weights are made there
        compare_curves(lambda: tiny(**sizes), text(60, 4, 512).cuda(), 2e-4)


# ---- head_arguments, GRPO


@pytest.mark.parametrize("kind, scale, cap", [("Llama", 1.0, None), ("Cohere", 0.25, None),
                                              ("Granite", 0.25, None), ("Gemma2", 1.0, 5.0),
                                              ("FalconH1", 0.5, None)])  # fmt: skip
def test_head_arguments(kind, scale, cap):
    model = tiny(kind)
    found = head_arguments(model)
    assert found["weight"] is model.get_output_embeddings().weight and found["bias"] is None
    assert [*found] == ["weight", "bias", "softcap", "logit_scale"]
    assert (found["logit_scale"], found["softcap"]) == (scale, cap)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Cohere"])
def test_grpo_of_a_head_with_lora(kind):
    model, inputs = lora(tiny(kind)), batch()
    ids, mask = inputs["input_ids"], (inputs["labels"][:, 1:] != IGNORE).float()
    advantages, results = torch.tensor([1.0, -0.5]), []
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
        old = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        old, ref = (old + 0.3 * torch.randn_like(old) for _ in range(2))
    for ours in (True, False):
        model.zero_grad()
        if ours:
            hidden = model.get_base_model().model(ids)[0]
            loss = script.grpo_loss(
                hidden[:, :-1], labels=ids[:, 1:], advantages=advantages, mask=mask, beta=0.04,
                old_logprobs=old, ref_logprobs=ref, **head_arguments(model))  # fmt: skip
        else:
            logits = model(input_ids=ids).logits[:, :-1]
            logp = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
            ratio, gain = torch.exp(logp - old), advantages[:, None]
            policy = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            tokens = policy + 0.04 * (torch.exp(ref - logp) - (ref - logp) - 1)
            loss = ((tokens * mask).sum(1) / mask.sum(1)).mean()
        loss.backward()
        named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append([loss.detach(), *named.values()])
    assert_near(*results)
    assert any("lm_head" in name and "lora_A" in name for name in named)


# ---- TRL


def words(k, count=6):
    return " ".join(f"w{(k * 7 + j * 3) % 250}" for j in range(count)) + " "


def word_tokenizer():
    special = ["<pad>", "<eos>", "<unk>", "user", "assistant"]
    vocab = {word: k for k, word in enumerate([*special, *(f"w{k}" for k in range(250))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template=template)  # fmt: skip


def trl_trainer(name, model, path, **options):
    """A trainer of TRL's over a few made-up texts."""
    trl = pytest.importorskip("trl")
    rest = {"processing_class": word_tokenizer()}
    if name == "SFT":
        rows = [{"text": words(k)} for k in range(8)]
    elif name == "DPO":
        rows = [{"prompt": [{"role": "user", "content": words(k)}],
                 "chosen": [{"role": "assistant", "content": words(k + 1)}],
                 "rejected": [{"role": "assistant", "content": words(k + 2)}]}
                for k in range(8)]  # fmt: skip
        rest["ref_model"] = copy.deepcopy(model)
    else:
        rows = [{"prompt": words(k)} for k in range(8)]
        rest["reward_funcs"] = lambda completions, **_: [float(len({*c})) for c in completions]
        options = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.7} | options
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
        **options)  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    return getattr(trl, f"{name}Trainer")(model, args=arguments, train_dataset=data, **rest)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_trl_trains_as_with_stock(name, tmp_path):
    models = tiny(), patch_causal_lm(tiny())
    want, got = (logged(trl_trainer(name, model, tmp_path)) for model in models)
    assert len(want) == 2 and all(norm > 0 for _, norm in want)
    assert np.allclose(got, want, rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    """(TRL's GRPOTrainer of a tiny Llama, a batch of its)."""
    model = tiny(num_hidden_layers=1)
    trainer = trl_trainer("GRPO", model, tmp_path_factory.mktemp("grpo"))
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    trainer.max_completion_length = 11
    torch.manual_seed(9)
    draw = functools.partial(torch.randint, 3, VOCAB)
    inputs = {"prompt_ids": draw((4, 5)), "prompt_mask": torch.ones(4, 5, dtype=torch.long),
              "completion_ids": draw((4, 9)),
              "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2])}  # fmt: skip
    inputs["prompt_mask"][0, :2] = 0
    inputs["completion_mask"] = (torch.arange(9) < torch.tensor([[9], [4], [7], [1]])).long()
    ids, mask = ([inputs[f"{part}_{name}"] for part in ("prompt", "completion")]
                 for name in ("ids", "mask"))  # fmt: skip
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(
            model, torch.cat(ids, 1), torch.cat(mask, 1), 9)[0]  # fmt: skip
    inputs["old_per_token_logps"], inputs["ref_per_token_logps"] = (
        logp + scale * torch.randn(4, 9) for scale in (0.5, 0.3)
    )
    inputs["num_items_in_batch"] = torch.tensor(33)
    return trainer, inputs


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_grpo_is_that_of_trl(loss_type, level, grpo):
    trainer, inputs = grpo
    model, given_inputs, seen = trainer.model.train(), dict(inputs), set()
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 1.3 if loss_type == "cispo" else 0.28
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    torch.manual_seed(10)
    ratios = None, torch.rand(4, 9) + 0.5, torch.rand(4, 1) + 0.5
    kl = (0.0, False), (0.04, False), (0.04, True)
    for (beta, corrected), delta, ratio, on_policy in itertools.product(
        kl, (None, 1.4), ratios, (False, True)
    ):
        trainer.beta, trainer.args.delta = beta, delta
        trainer.args.use_bias_correction_kl = corrected
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = ratio is not None
        given_inputs["importance_sampling_ratio"] = ratio
        old = None if on_policy else inputs["old_per_token_logps"]
        given_inputs["old_per_token_logps"] = old
        results = []
        for ours in (True, False):
            model.zero_grad()
            if ours:
                hidden = model.model(input_ids=ids, attention_mask=attention)[0][:, 4:-1]
                loss = script.grpo_loss(
                    hidden, labels=inputs["completion_ids"], advantages=inputs["advantages"],
                    mask=inputs["completion_mask"], old_logprobs=old, beta=beta, delta=delta,
                    ref_logprobs=inputs["ref_per_token_logps"], epsilon=trainer.epsilon_low,
                    epsilon_high=trainer.epsilon_high, loss_type=loss_type,
                    importance_sampling_level=level, use_bias_correction_kl=corrected,
                    importance_sampling_ratio=ratio, temperature=trainer.temperature,
                    sapo_temperature_pos=trainer.args.sapo_temperature_pos,
                    sapo_temperature_neg=trainer.args.sapo_temperature_neg,
                    max_completion_length=11, num_items=inputs["num_items_in_batch"],
                    **head_arguments(model))  # fmt: skip
            else:
                loss = trainer._compute_loss(model, given_inputs)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        loss, norm = (results[1][k].norm().item() for k in (0, -1))
        assert norm > 1e-3
        assert abs(results[0][0] - results[1][0]) <= 1e-5 + 1e-4 * loss
        assert_near(results[0][1:], results[1][1:], 2e-4)
        seen.add(round(loss, 5))
    assert len(seen) >= 12, seen  # the options were heard


# ---- DDP and FSDP2


def sharded(model, *first):
    for module in (*model.model.layers, *first, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return model


def rank_main(rank, path):
    """A rank of two has half of the batch; rank 0 saves the averaged gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    inputs = {name: t.chunk(2)[rank] for name, t in batch(4, share=0.0).items()}
    for way in (nn.parallel.DistributedDataParallel, sharded):
        run = way(patch_causal_lm(tiny()))
        out = run(**inputs)
        assert out.logits is None
        out.loss.backward()
        dist.all_reduce(loss := out.loss.detach() / 2)
        grads = [p.grad for p in run.parameters()]
        if way is sharded:
            assert all(isinstance(g, DTensor) for g in grads)
            grads = [g.full_tensor() for g in grads]
        if rank == 0:
            torch.save([loss, *grads], f"{path}/{way.__name__}.pt")
    model = patch_causal_lm(tiny())
    model = sharded(model, model.lm_head)
    with refused("head"):
        model(**inputs)
    dist.barrier()
    dist.destroy_process_group()


def test_ddp_and_fsdp2(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    want = step(tiny(), **batch(4, share=0.0))
    found = [torch.load(path) for path in tmp_path.glob("*.pt")]
    assert len(found) == 2
    for got in found:
        assert_near(got, want)

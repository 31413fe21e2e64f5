"""Uses a checkpoint in every way that its users do, under the transformers of this process: one probe for each way.

A script for a fresh process without this repository: `python -I probe.py CHECKPOINT PICTURE OUTPUT`. It needs torch,
transformers, pillow, numpy and safetensors. It writes OUTPUT.json (installed versions; status and error of each probe)
and OUTPUT.safetensors (what the probes that passed return, named `probe/tensor`). `run.py` compares the tensors of
two versions. Here each probe compares what must agree within one version: generation with and without a cache above
all, because a model that ignores its cache gives the right logits in every single forward.
"""

import importlib.metadata
import importlib.util
import inspect
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)

# transformers before 5.18 offers this name at its top only where torchvision is installed, for every model.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llama.modeling_llama import LlamaModel


QUESTION = "Is there a red apple in the image?"
MORE = "How many trees are there?"
NEW_TOKENS = 12  # the checkpoint answers in one word and stops; errors of a cache show in the tokens after the first
GREEDY = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
TOLERANCE = 1e-5
DISTRIBUTIONS = ("transformers", "huggingface_hub", "tokenizers", "safetensors", "torch", "numpy", "pillow")
# One parameter of each part: tower, projector, cross block, language model (its embeddings are tied to the head).
WATCHED_GRADIENTS = (
    "model.vision_tower.embeddings.patch_embeddings.weight",
    "model.multi_modal_projector.linear_1.weight",
    "model.language_model.cross_attention_layers.0.cross_attn.q_proj.weight",
    "model.language_model.cross_attention_layers.1.cross_attn.k_proj.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.embed_tokens.weight",
)

Tensors = dict[str, torch.Tensor]


class Subject:
    """The checkpoint, its processor, and the questions that probes ask."""

    def __init__(self, folder: Path, picture: Path):
        self.folder, self.picture_file = folder, picture

    def load(self, auto_class=AutoModelForImageTextToText, **kwargs) -> torch.nn.Module:
        """A model of its own, for probes that change it."""
        return auto_class.from_pretrained(self.folder, trust_remote_code=True, **kwargs)

    @cached_property
    def model(self) -> torch.nn.Module:
        return self.load()

    @cached_property
    def processor(self):
        return AutoProcessor.from_pretrained(self.folder, trust_remote_code=True)

    @cached_property
    def picture(self) -> Image.Image:
        with Image.open(self.picture_file) as picture:
            return picture.convert("RGB")

    @cached_property
    def wide_picture(self) -> Image.Image:
        """Three times as wide as high, so that it is padded."""
        picture = Image.new("RGB", (180, 60), "white")
        draw = ImageDraw.Draw(picture)
        draw.ellipse((10, 10, 50, 50), fill="red")
        draw.rectangle((100, 5, 170, 55), fill="blue", outline="black")
        return picture

    def text(self, question: str, pictures: int) -> str:
        content = "<|image|>" * pictures + question
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def encode(self, question: str, *pictures: Image.Image, **kwargs) -> Tensors:
        text = self.text(question, len(pictures))
        return dict(self.processor(text=[text], images=[list(pictures)], return_tensors="pt", **kwargs))

    def conversation(self) -> list[dict]:
        content = [{"type": "image", "path": str(self.picture_file)}, {"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": content}]

    @cached_property
    def inputs(self) -> Tensors:
        return self.encode(QUESTION, self.picture)

    @cached_property
    def guided_inputs(self) -> Tensors:
        text = self.text(QUESTION, 1)
        start = text.index("red apple")
        mask = Image.new("L", self.picture.size)
        width, height = mask.size
        ImageDraw.Draw(mask).rectangle((width // 4, height // 4, width // 2, height // 2), fill=255)
        spans, masks = [(start, start + len("red apple"))], [mask]
        return self.encode(QUESTION, self.picture, guidance_spans=spans, guidance_masks=masks)

    @cached_property
    def labelled_inputs(self) -> Tensors:
        return {**self.guided_inputs, "labels": self.guided_inputs["input_ids"]}

    @cached_property
    def answer(self) -> torch.Tensor:
        """What the model answers to `inputs` without a cache; every way of generation must give these tokens."""
        return generate(self.model, self.inputs, use_cache=False)


def generate(model: torch.nn.Module, inputs: Tensors, **settings) -> torch.Tensor:
    """The tokens that follow those of `inputs`."""
    return model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :]


def logits(model: torch.nn.Module, inputs: Tensors) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def must_equal(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises `AssertionError` with both values where integers differ, with the difference where numbers do."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not expected.is_floating_point():
        if not torch.equal(actual, expected):
            raise AssertionError(f"{name}: {actual.flatten()[:16].tolist()}, not {expected.flatten()[:16].tolist()}")
        return
    difference = (actual - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise AssertionError(f"{name}: differs by {difference:.2g}")


PROBES: dict[str, Callable[[Subject], Tensors]] = {}


def probe(function: Callable[[Subject], Tensors]) -> Callable[[Subject], Tensors]:
    PROBES[function.__name__] = function
    return function


@probe
def processor_tensors(subject: Subject) -> Tensors:
    wide = subject.encode(QUESTION, subject.wide_picture)
    return {**subject.guided_inputs, "wide_pixel_values": wide["pixel_values"]}


@probe
def chat_template(subject: Subject) -> Tensors:
    batch = subject.processor.apply_chat_template(
        subject.conversation(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for name, expected in subject.inputs.items():
        must_equal(name, batch[name], expected)
    return dict(batch)


@probe
def auto_parts(subject: Subject) -> Tensors:
    """What can be loaded without the rest."""
    config = AutoConfig.from_pretrained(subject.folder, trust_remote_code=True)
    if config.model_type != "agevlm" or config.text_config.to_dict() != subject.model.config.text_config.to_dict():
        raise AssertionError(f"AutoConfig loads another configuration: {config}")
    tokenizer = AutoTokenizer.from_pretrained(subject.folder, trust_remote_code=True)
    ids = tokenizer(subject.text(QUESTION, 1), add_special_tokens=False, return_tensors="pt")["input_ids"]
    must_equal("input_ids", ids, subject.inputs["input_ids"])
    image_processor = AutoImageProcessor.from_pretrained(subject.folder, trust_remote_code=True)
    pixels = image_processor(subject.picture, return_tensors="pt")["pixel_values"]
    must_equal("pixel_values", pixels, subject.inputs["pixel_values"][0])
    return {}


@probe
def forward(subject: Subject) -> Tensors:
    with torch.no_grad():
        output = subject.model(**subject.inputs)
    return {"logits": output.logits, "visual_tokens": output.image_outputs.pooler_output}


@probe
def auto_model(subject: Subject) -> Tensors:
    model = subject.load(AutoModel)
    must_equal("logits", logits(model, subject.inputs), logits(subject.model, subject.inputs))
    tokens = generate(model, subject.inputs)
    must_equal("tokens", tokens, subject.answer)
    return {"tokens": tokens}


@probe
def embeddings(subject: Subject) -> Tensors:
    model = subject.load()
    table = model.get_input_embeddings()
    if table is not model.model.language_model.embed_tokens or model.get_output_embeddings() is not model.lm_head:
        raise AssertionError("get_input_embeddings or get_output_embeddings returns another module")
    if model.lm_head.weight is not table.weight:
        raise AssertionError("lm_head is not tied to the embeddings")
    rows = table.weight.shape[0]
    model.resize_token_embeddings(rows + 8, mean_resizing=False)
    resized = logits(model, subject.inputs)
    must_equal("rows", torch.tensor(resized.shape[-1]), torch.tensor(rows + 8))
    must_equal("logits", resized[..., :rows], logits(subject.model, subject.inputs))
    return {"weight": table.weight.detach().clone()}


@probe
def generate_with_cache(subject: Subject) -> Tensors:
    output = subject.model.generate(**subject.inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    tokens = output.sequences[:, subject.inputs["input_ids"].shape[1] :]
    must_equal("tokens", tokens, subject.answer)
    return {"tokens": tokens, "logits": torch.stack(output.logits, 1)}


@probe
def generate_without_cache(subject: Subject) -> Tensors:
    return {"tokens": subject.answer}


@probe
def padded_batch(subject: Subject) -> Tensors:
    """Three rows of different lengths: one picture, none, two."""
    questions = (QUESTION, "Describe a house.", "How many cars are in the images? Describe them.")
    pictures = ([subject.picture], [], [subject.picture, subject.wide_picture])
    texts = [subject.text(question, len(row)) for question, row in zip(questions, pictures, strict=True)]
    batch = dict(subject.processor(text=texts, images=pictures, return_tensors="pt"))
    if batch["attention_mask"][:, 0].all() or not batch["attention_mask"][:, -1].all():
        raise AssertionError("the batch is not padded on the left")
    alone = [
        generate(subject.model, subject.encode(question, *row))
        for question, row in zip(questions, pictures, strict=True)
    ]
    if len({tuple(row.flatten().tolist()) for row in alone}) < 3:
        raise AssertionError("rows have the same answer: the comparison proves nothing")
    tokens = generate(subject.model, batch)
    must_equal("tokens", tokens, torch.cat(alone))
    must_equal("tokens without a cache", generate(subject.model, batch, use_cache=False), tokens)
    return {"tokens": tokens, "logits": logits(subject.model, batch)}


@probe
def text_only(subject: Subject) -> Tensors:
    inputs = dict(subject.processor(text=[subject.text("Describe a house.", 0)], return_tensors="pt"))
    tokens = generate(subject.model, inputs)
    must_equal("tokens", tokens, generate(subject.model, inputs, use_cache=False))
    return {"tokens": tokens, "logits": logits(subject.model, inputs)}


@probe
def two_pictures(subject: Subject) -> Tensors:
    inputs = subject.encode(QUESTION, subject.picture, subject.wide_picture)
    tokens = generate(subject.model, inputs)
    must_equal("tokens", tokens, generate(subject.model, inputs, use_cache=False))
    return {"tokens": tokens, "logits": logits(subject.model, inputs)}


def _guidance(subject: Subject, name: str, **left_out) -> torch.Tensor:
    with torch.no_grad():
        return subject.model(**{**subject.guided_inputs, **left_out})[name]


@probe
def guidance_maps(subject: Subject) -> Tensors:
    maps = _guidance(subject, "cross_attention_maps", guidance_mask=None)
    must_equal("sum of the maps", maps.sum(-1), torch.ones(maps.shape[:2]))
    return {"maps": maps}


@probe
def guidance_mass(subject: Subject) -> Tensors:
    mass = _guidance(subject, "cross_attention_mass")
    maps = _guidance(subject, "cross_attention_maps", guidance_mask=None)
    must_equal("mass", mass, (maps * subject.guided_inputs["guidance_mask"].flatten(1)).sum(-1))
    return {"mass": mass}


@probe
def eager_attentions(subject: Subject) -> Tensors:
    model = subject.load(attn_implementation="eager")
    with torch.no_grad():
        output = model(**subject.inputs, output_attentions=True, output_hidden_states=True)
    must_equal("logits", output.logits, logits(subject.model, subject.inputs))
    must_equal("tokens", generate(model, subject.inputs), subject.answer)
    names = ("attentions", "cross_attentions", "hidden_states")
    return {f"{name}.{i}": value for name in names for i, value in enumerate(output[name])}


@probe
def beams(subject: Subject) -> Tensors:
    settings = {"num_beams": 3, "num_return_sequences": 2}
    tokens = generate(subject.model, subject.inputs, **settings)
    must_equal("tokens", tokens, generate(subject.model, subject.inputs, use_cache=False, **settings))
    return {"tokens": tokens}


@probe
def static_cache(subject: Subject) -> Tensors:
    """Kept and reset between prompts by older versions: of other lengths, with a picture, without, with one again."""
    model, settings = subject.load(), {"cache_implementation": "static", "disable_compile": True}
    text = dict(subject.processor(text=[subject.text("Describe a house.", 0)], return_tensors="pt"))
    tokens = generate(model, subject.inputs, **settings)
    must_equal("tokens", tokens, subject.answer)
    must_equal("tokens of text", generate(model, text, **settings), generate(model, text, use_cache=False))
    must_equal("tokens again", generate(model, subject.inputs, **settings), subject.answer)
    return {"tokens": tokens}


@probe
def pictures_once(subject: Subject) -> Tensors:
    """The tower runs for the prompt only, and `generate` needs no masks: a version that sends the pictures at every
    step misses their placeholders."""
    model, runs = subject.load(), []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    bare = {name: subject.inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    tokens = generate(model, bare)
    must_equal("runs of the tower", torch.tensor(len(runs)), torch.tensor(1))
    must_equal("tokens without a cache", generate(model, bare, use_cache=False), tokens)
    return {"tokens": tokens}


@probe
def drafted_tokens(subject: Subject) -> Tensors:
    """Drafts from the prompt and of a second model, for a row without and with padding. Rejected ones are taken back
    from the cache."""
    length = subject.inputs["input_ids"].shape[1] + 8
    padded = subject.encode(QUESTION, subject.picture, padding="max_length", max_length=length)
    for draft in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": subject.load()}):
        for inputs in (subject.inputs, padded):
            name = f"tokens after {inputs['input_ids'].shape[1]} with {next(iter(draft))}"
            must_equal(name, generate(subject.model, inputs, **draft), subject.answer)
    return {}


def _longer(subject: Subject, inputs: Tensors, tokens: torch.Tensor) -> Tensors:
    """`inputs` with the answer `tokens` and a second question behind it."""
    more = subject.processor.tokenizer(MORE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([inputs["input_ids"], tokens, more], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _without_pictures(inputs: Tensors) -> Tensors:
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


def _returned_cache(output) -> dict:
    """The cache of an output under the name that it has there, which is the name of the argument too. Asked of the
    keys: `in` and attributes of newer versions know the older name as well."""
    return {name: output[name] for name in output.keys() & {"cache", "past_key_values"}}


@probe
def second_turn(subject: Subject) -> Tensors:
    """Over the cache that the first turn has returned, without sending the picture again."""
    first = subject.model.generate(**subject.inputs, **GREEDY, return_dict_in_generate=True)
    cache = _returned_cache(first)
    if len(cache) != 1:
        raise AssertionError(f"the cache of {list(first)} has {len(cache)} names")
    longer = _longer(subject, subject.inputs, first.sequences[:, subject.inputs["input_ids"].shape[1] :])
    tokens = generate(subject.model, _without_pictures(longer), **cache)
    must_equal("tokens", tokens, generate(subject.model, longer, use_cache=False))
    return {"tokens": tokens}


@probe
def returned_cache(subject: Subject) -> Tensors:
    """A prefill and one step by hand."""
    length = subject.inputs["input_ids"].shape[1]
    longer = _longer(subject, subject.inputs, subject.answer)
    with torch.no_grad():
        output = subject.model(**subject.inputs, use_cache=True)
        cache = _returned_cache(output)
        must_equal("number of caches", torch.tensor(len(cache)), torch.tensor(1))
        step = subject.model(**{**_without_pictures(longer), "input_ids": longer["input_ids"][:, length:]}, **cache)
    must_equal("logits", step.logits, logits(subject.model, longer)[:, length:])
    return {"logits": step.logits}


def _cache_arguments(forward: Callable) -> list[str]:
    """The names under which a cache can be given: the old one always, the new one where the signature has it."""
    return ["past_key_values", *(name for name in inspect.signature(forward).parameters if name == "cache")]


@probe
def given_cache(subject: Subject) -> Tensors:
    """A cache of the caller's, under each of its names, to `generate` and to `forward`; both must fill it."""
    length = subject.inputs["input_ids"].shape[1]
    for name in _cache_arguments(LlamaModel.forward):  # of `generate` too, which is transformers'
        cache = DynamicCache(config=subject.model.config)
        must_equal(f"tokens with {name}", generate(subject.model, subject.inputs, **{name: cache}), subject.answer)
        filled = torch.tensor(cache.get_seq_length())
        must_equal(f"tokens in `generate({name}=...)`", filled, torch.tensor(length + NEW_TOKENS - 1))
    for name in _cache_arguments(subject.model.forward):
        cache = DynamicCache()
        expected = logits(subject.model, subject.inputs)
        must_equal(f"logits with {name}", logits(subject.model, {**subject.inputs, name: cache}), expected)
        must_equal(f"tokens in `forward({name}=...)`", torch.tensor(cache.get_seq_length()), torch.tensor(length))
    return {}


@probe
def text_pipeline(subject: Subject) -> Tensors:
    ask = pipeline("image-text-to-text", model=str(subject.folder), trust_remote_code=True)
    turns = ask(text=subject.conversation(), generate_kwargs=GREEDY)[0]["generated_text"]
    expected = subject.processor.decode(subject.answer[0], skip_special_tokens=True)
    if turns[-1]["role"] != "assistant" or turns[-1]["content"] != expected:
        raise AssertionError(f"the last turn is {turns[-1]}, not the answer {expected!r}")
    return {"text": torch.tensor(list(expected.encode()), dtype=torch.uint8)}


@probe
def save_and_reload(subject: Subject) -> Tensors:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        subject.model.save_pretrained(folder)
        subject.processor.save_pretrained(folder)
        code = {path.name: path.read_bytes() for path in subject.folder.glob("*.py")}
        saved = {path.name: path.read_bytes() for path in folder.glob("*.py")}
        if saved != code:
            wrong = sorted(name for name in code | saved if code.get(name) != saved.get(name))
            raise AssertionError(f"code that is missing, added or changed in the saved folder: {', '.join(wrong)}")
        before, after = (load_file(each / "model.safetensors") for each in (subject.folder, folder))
        if before.keys() != after.keys():
            raise AssertionError(f"saved weights differ in {sorted(before.keys() ^ after.keys())[:4]}")
        for name, value in before.items():
            must_equal(name, after[name], value)
        again = Subject(folder, subject.picture_file)
        tokens = generate(again.model, again.inputs)
    must_equal("tokens", tokens, subject.answer)
    return {"tokens": tokens}


def _gradient_norms(model: torch.nn.Module, inputs: Tensors, **kwargs) -> Tensors:
    """Norms of the watched gradients of the language-model loss plus the guidance loss of the maps."""
    model.train()
    mask = inputs["guidance_mask"].flatten(1)
    output = model(**{**inputs, "guidance_mask": None}, **kwargs)
    mass = (output.cross_attention_maps * mask).sum(-1)  # of a sharp look elsewhere it may be 0
    loss = output.loss - (mass + 1e-6).log().mean()
    loss.backward()
    parameters = dict(model.named_parameters())
    norms = {name: parameters[name].grad.norm() for name in WATCHED_GRADIENTS}
    if not all(norm > 0 for norm in norms.values()):
        raise AssertionError(f"no gradient arrives at {[name for name, norm in norms.items() if not norm > 0]}")
    return {"loss": loss.detach(), **norms}


@probe
def backward(subject: Subject) -> Tensors:
    return _gradient_norms(subject.load(), subject.labelled_inputs)


@probe
def checkpointed_backward(subject: Subject) -> Tensors:
    expected = _gradient_norms(subject.load(), subject.labelled_inputs)
    model = subject.load()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    norms = _gradient_norms(model, subject.labelled_inputs, use_cache=True)
    for name, value in expected.items():
        must_equal(name, norms[name], value)
    return norms


def run(subject: Subject) -> tuple[dict[str, dict], Tensors]:
    """Status and error of each probe, and the tensors of those that passed. Tracebacks go to stderr."""
    report, tensors = {}, {}
    for name, function in PROBES.items():
        try:
            returned = function(subject)
        except Exception as error:
            print(f"--- {name}", file=sys.stderr)
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            report[name] = {"passed": False, "error": f"{type(error).__name__}: {first_line}"}
        else:
            report[name] = {"passed": True, "error": None}
            tensors |= {f"{name}/{key}": value.detach().clone().contiguous() for key, value in returned.items()}
    return report, tensors


def main(checkpoint: str, picture: str, output: str) -> None:
    if importlib.util.find_spec("agevlm") is not None:
        raise SystemExit("`agevlm` can be imported: this process proves nothing about a checkpoint by itself.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    report, tensors = run(Subject(Path(checkpoint), Path(picture)))
    save_file(tensors, f"{output}.safetensors")
    versions = {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
    Path(f"{output}.json").write_text(json.dumps({"versions": versions, "probes": report}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

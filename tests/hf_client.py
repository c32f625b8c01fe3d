"""What a user of an exported folder does with transformers alone, in whatever version runs this; prints JSON.

    PYTHON hf_client.py write FOLDER      CLIP, LLaMA and Q-Former folders as this version writes them
    PYTHON hf_client.py read FOLDER       an export: its parts, each under its published class, and the whole: scores,
                                          comments, every kind of generation, saving, wrong input
    PYTHON hf_client.py families FOLDER   a folder of exports of several families: what differs among them
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors
import torch
import transformers
from PIL import Image


def write(folder):
    torch.manual_seed(0)
    models = {
        "vit": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
            image_size=28, patch_size=7, hidden_size=24, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=40)),
        "llm": transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=2048, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=5000.0)),
        "qformer": transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, encoder_hidden_size=24,
            cross_attention_frequency=2, num_query_tokens=6))}
    for name, model in models.items():
        for parameter in model.parameters():  # fresh models have zero biases and unit norms, which hide mistakes
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(pathlib.Path(folder) / name)
    return {"transformers": transformers.__version__}


def parts(folder):
    folder, found = pathlib.Path(folder) / "parts", {}
    qformers = {name: transformers.Blip2QFormerModel for name in ("qformer_low", "qformer_middle", "qformer_high")}
    for name, cls in {"vision_tower": transformers.CLIPVisionModel, "language_model": transformers.LlamaForCausalLM,
                      **qformers}.items():
        config = transformers.Blip2QFormerConfig.from_pretrained(folder / name) if name in qformers else None
        _, info = cls.from_pretrained(folder / name, output_loading_info=True, **({"config": config} if config else {}))
        found[name] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "language_model")
    found["tokens"] = tokenizer("It has noise: 10.0")["input_ids"]
    return found


def use(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    images = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (40 + n, 50, 3), np.uint8)) for n in range(5)]
    found = {"transformers": transformers.__version__, "scores": model.score(images, batch_size=2),
             "alone": [score for image in images for score in model.score(image)],
             "spread": model.score(images[:1], with_spread=True),
             "comments": model.comment(images, max_new_tokens=6, batch_size=3),
             "asked": model.ask(images[:1], "Why?", max_new_tokens=6)}
    inputs = processor(images=images[:1], text="What would improve this photograph?")
    start = inputs["input_ids"].shape[1]
    found["said"], found["lengths"] = {}, {}
    lengths = []  # of what the language model is given at each step
    model.language_model.model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    for name, options in {"greedy": {}, "beams": {"num_beams": 3}, "uncached": {"use_cache": False},
                          "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
                          "several": {"do_sample": True, "num_return_sequences": 2}}.items():
        torch.manual_seed(0)
        lengths.clear()
        found["said"][name] = model.generate(**inputs, max_new_tokens=5, **options)[:, start:].tolist()
        found["lengths"][name] = [length - start for length in lengths]
    mixed = processor(images=[images[:2], []], text=["<image> or <image>: which?", "Hello."])
    loss = model(**mixed, labels=mixed["input_ids"]).loss
    loss.backward()
    found["gradient"] = bool(torch.isfinite(model.mfam.qformers[0].query_tokens.grad).all())
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "A thing."}, {"role": "user", "content": "Why?"}]
    found["conversation"] = processor.batch_decode(processor(images=images[0], text=conversation)["input_ids"])
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        again = transformers.AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        found["saved"] = again.score(images)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                               torch_dtype=torch.bfloat16)
    found["bfloat16"] = narrow.score(images)
    found["refused"] = []
    for pictures, text in ((["/nowhere.jpg"], "a"), (None, "<image> a"), (images[:2], ["a", "b", "c"]),
                           (None, "USER: a"), ([np.zeros((4, 4))], "a"),
                           (images[:1], [{"role": "system", "content": "a"}])):
        try:
            processor(images=pictures, text=text)
        except ValueError as error:
            found["refused"].append(str(error))
    return found


def load(cls, folder):
    """A model, and what of its tensors is missing or not expected."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, trust_remote_code=True)
    return model.eval(), {key: sorted(map(str, value)) for key, value in info.items() if value}


def families(folder):
    return {each.name: family(each) for each in sorted(pathlib.Path(folder).iterdir())}


@torch.no_grad()
def family(folder):
    model, loading = load(transformers.AutoModelForCausalLM, folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    inputs = processor(images=[image], text="What would improve this photograph?")
    start, lengths = inputs["input_ids"].shape[1], []
    hook = model.language_model.model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))

    def greedy(model, **options):
        return model.generate(**inputs, max_new_tokens=6, **options)[0, start:].tolist()

    def tied(model):
        return model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight

    found = {"loading": loading, "greedy": greedy(model), "lengths": list(lengths)}
    hook.remove()
    found |= {"uncached": greedy(model, use_cache=False), "said": processor.decode(found["greedy"]),
              "conversation": processor(text=[
                  {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A thing."},
                  {"role": "user", "content": "Why <b>?"}])["input_ids"][0].tolist()}
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        with safetensors.safe_open(f"{saved}/model.safetensors", "pt") as stored:
            found["written"] = sorted(stored.keys())
        again, _ = load(transformers.AutoModelForCausalLM, saved)
        found |= {"saved": greedy(again), "tied": [tied(model), tied(again)]}
    words, eyes = folder / "parts" / "language_model", folder / "parts" / "vision_tower"
    if known(words):
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        found["language_model"] = {
            "loading": load(transformers.AutoModelForCausalLM, words)[1],
            "words": tokenizer("It has noise: 10.0", add_special_tokens=False)["input_ids"]}
    if known(eyes):
        prepare = transformers.AutoImageProcessor.from_pretrained(eyes)
        found["vision_tower"] = {
            "loading": load(transformers.AutoModel, eyes)[1], "mean": list(prepare.image_mean),
            "std": list(prepare.image_std), "shape": list(prepare(image, return_tensors="pt")["pixel_values"].shape)}
    return found


def known(folder):
    """Whether this version has the class of a part."""
    return json.loads((folder / "config.json").read_text())["model_type"] in transformers.CONFIG_MAPPING


def read(folder):
    return {"parts": parts(folder), "whole": use(folder)}


if __name__ == "__main__":
    print(json.dumps({"write": write, "read": read, "families": families}[sys.argv[1]](sys.argv[2])))

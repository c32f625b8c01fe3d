"""An exported folder and a request in; what torch computes of it, as arrays, out. The torch half of `convert.parity`.

    PYTHON parity_torch.py FOLDER REQUEST.json OUT [FOLDER REQUEST.json OUT ...]

For each folder it writes one .npz for each conversation, and OUT/rest.npz. It needs torch, transformers, pillow and
what the folder's tokenizer needs (sentencepiece, where it is a tokenizer.model), and nothing of this package, so that
any interpreter with any version of transformers can run it.
"""

import json
import os
import sys

import numpy as np
import torch
import transformers


def main(folder: str, request: str, out: str) -> None:
    with open(request) as stream:
        wanted = json.load(stream)
    loading = {"trust_remote_code": True, "output_loading_info": True, "torch_dtype": getattr(torch, wanted["dtype"])}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **loading)
    model.eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    states, longest = {}, 0
    watch(model, states)
    with torch.no_grad():
        for number, case in enumerate(wanted["cases"]):
            inputs = processor(images=case["images"], text=case["text"], parts=case["parts"])
            states.clear()
            result = model(**inputs)
            found = {"input_ids": inputs["input_ids"], "visual": inputs["visual"],
                     "attention_mask": inputs["attention_mask"], "logits": result.logits, **states}
            for name, beams in (("said", 1), ("searched", wanted["beams"])):
                said = model.generate(**inputs, max_new_tokens=wanted["new_tokens"], do_sample=False, num_beams=beams)
                found[name] = said[:, inputs["input_ids"].shape[1]:]
            longest = max(longest, inputs["input_ids"].shape[1])
            np.savez(os.path.join(out, f"{number}.npz"), **{
                name: (value.float() if value.is_floating_point() else value).numpy()
                for name, value in found.items()})
    scores = [model.score(wanted["score"], with_spread=True, reader=reader) for reader in wanted["readers"]]
    comments = model.comment(wanted["score"], max_new_tokens=8) if wanted["score"] else []
    report = json.dumps({
        "transformers": transformers.__version__, "torch": torch.__version__, "comments": comments,
        **{name: sorted(str(key) for key in info[name]) for name in ("missing_keys", "unexpected_keys",
                                                                     "mismatched_keys")}})
    np.savez(os.path.join(out, "rest.npz"), scores=np.asarray(scores), longest=longest, report=report)


def watch(model, states: dict) -> None:
    """Keeps what every block of the model gives, by the stage's name, from then on. Only the first call after a
    `states.clear()` counts: generation goes on after it."""
    def keep(name):
        def hook(_, __, value):
            states.setdefault(name, value)
        return hook

    tower, levels = model.vision_tower, ("low", "middle", "high")
    tower.blocks[0].register_forward_pre_hook(lambda block, inputs: keep("encoder 0")(block, inputs, inputs[0]))
    for number, block in enumerate(tower.blocks, 1):
        block.register_forward_hook(keep(f"encoder {number}"))
    for level, qformer in zip(levels, model.mfam.qformers, strict=True):
        qformer.register_forward_hook(keep(f"Q-Former {level}"))
    model.mfam.thematic.register_forward_hook(keep("thematic"))
    for number, block in enumerate(model.language_model.model.layers, 1):
        block.register_forward_hook(keep(f"LLM {number}"))
    model.language_model.model.norm.register_forward_hook(keep("LLM norm"))


if __name__ == "__main__":
    for first in range(1, len(sys.argv), 3):
        main(*sys.argv[first:first + 3])

"""Loads pipeline folders that crates/models wrote with the libraries that are installed, without a
warning of missing or unexpected keys, and makes an image of each.

    python scripts/parity/load.py FOLDER ... [--adapters FOLDER]

scripts/parity/run.py runs it with the newest libraries and with older ones (requirements.txt, older.txt).
"""

import argparse
import json
import logging
import pathlib


class Complaints(logging.Handler):
    """Every warning that a library logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = []

    def emit(self, record):
        self.found.append(f"{record.name}: {record.getMessage()}")

    def of_keys(self):
        words = ("key", "newly initialized", "not used", "unexpected", "not expected", "mismatch")
        return [line for line in self.found if any(word in line.lower() for word in words)]


def load_folder(folder):
    from diffusers import QwenImagePipeline
    from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt="a red four", negative_prompt=" ", width=32, height=24,
                 num_inference_steps=2, true_cfg_scale=4.0, output_type="np").images
    assert image.shape == (1, 24, 32, 3), image.shape
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report.get(kind), (kind, report[kind])
    # What either kind of config says must be what the model computes with.
    text = pipe.text_encoder.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or text.rope_scaling
    written = json.loads((folder / "text_encoder" / "config.json").read_text())
    written = written.get("text_config", written)
    theta = written.get("rope_theta") or written["rope_parameters"]["rope_theta"]
    assert (rope.get("rope_theta") or text.rope_theta) == theta and rope["mrope_section"], text
    prefix = pipe.prompt_template_encode.split("{}")[0]
    for tokenizer in (AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder).tokenizer):
        assert len(tokenizer(prefix).input_ids) == 34
    return pipe


def load_adapters(pipe, folder):
    import torch
    from peft import PeftModel

    for model, name in ((pipe.transformer, "dit"), (pipe.text_encoder, "lm")):
        tuned = PeftModel.from_pretrained(model, folder / name)
        scale = [p.abs().max() for n, p in tuned.named_parameters() if "lora_B" in n]
        assert scale and min(scale) > 0, f"the {name} adapter did not load"
        assert all(torch.isfinite(p).all() for p in tuned.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--adapters", type=pathlib.Path, help="adapters to put on the first folder's models")
    arguments = parser.parse_args()
    import diffusers
    import torch
    import transformers

    complaints = Complaints()
    for library in ("diffusers", "transformers", "peft"):
        logging.getLogger(library).addHandler(complaints)
    torch.set_num_threads(1)
    pipes = [load_folder(folder) for folder in arguments.folders]
    if arguments.adapters:
        load_adapters(pipes[0], arguments.adapters)
    assert not complaints.of_keys(), "\n".join(complaints.of_keys())
    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: "
          f"{len(pipes)} folders load without a warning of keys, and draw")


if __name__ == "__main__":
    main()

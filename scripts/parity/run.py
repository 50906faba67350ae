"""Compares crates/models with transformers, diffusers and PEFT, afresh: `make parity`.

1. Fixtures are generated anew with the installed libraries and the Rust tests run on them.
2. A pipeline folder and adapters that the Rust tests write are loaded by the libraries, without a
   warning of missing or unexpected keys, and an image is made.
3. So is the folder that a run trained (`--trained`, runs/demo/model), where there is one.
"""

import argparse
import logging
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Complaints(logging.Handler):
    """Every warning that a library logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = []

    def emit(self, record):
        self.found.append(f"{record.name}: {record.getMessage()}")


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


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=pathlib.Path, default=ROOT / "runs" / "demo" / "model",
                        help="model folder that a run exported (default: the demo's)")
    return parser.parse_args()


def main():
    trained = arguments().trained
    import diffusers
    import torch
    import transformers

    complaints = Complaints()
    for library in ("diffusers", "transformers", "peft"):
        logging.getLogger(library).addHandler(complaints)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, "
          f"transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        fixtures = scratch / "fixtures"
        subprocess.run([sys.executable, HERE / "generate.py", fixtures], check=True)
        paths = {"DUET_FIXTURES": fixtures, "DUET_PARITY_FOLDER": scratch / "folder",
                 "DUET_PARITY_ADAPTERS": scratch / "adapters"}
        env = os.environ | {key: str(path) for key, path in paths.items()}
        tests = ["--test", "parity", "--test", "folder", "--test", "losses"]
        subprocess.run(["cargo", "test", "-p", "duet-models", *tests], cwd=ROOT, env=env, check=True)
        pipe = load_folder(scratch / "folder")
        load_adapters(pipe, scratch / "adapters")
    if (trained / "model_index.json").is_file():
        load_folder(trained)
        print(f"the trained folder {trained} loads and draws")
    else:
        print(f"no trained folder at {trained}: run `make demo` first to check it too")
    loud = [line for line in complaints.found if "key" in line.lower() or "newly initialized" in line]
    assert not loud, "\n".join(loud)
    print("parity: ok")


if __name__ == "__main__":
    main()

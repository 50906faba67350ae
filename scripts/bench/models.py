"""The models' hot paths beside the Python libraries: `make bench`.

Same folder of weights, as many threads, both sides in the same run: each round times a piece on one
side and then on the other, and the medians' ratio is printed (above 1: Duet is faster). Writes
target/bench/results.json.

On a machine that other work shares, `--clock cpu --threads 1` compares the processors' time of both
sides instead of the clock's.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

import results

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "target" / "bench"
# name, what it is, the ratio that is wanted
PIECES = [
    ("tokens-medium-32", "16 sequences of 32 tokens, 5.8 M parameters", 3.0),
    ("tokens-medium-128", "16 sequences of 128 tokens, 5.8 M parameters", 3.0),
    ("tokens-small-32", "16 sequences of 32 tokens, 1 M parameters", 5.0),
    ("tokens-small-128", "16 sequences of 128 tokens, 1 M parameters", 5.0),
    ("dit-sampling", "DiT, 10 steps, guidance, 16 images of 64 x 64", 1.4),
    ("vae-decode", "VAE decode of 16 images", 2.0),
    ("dit-update", "DiT window update: LoRA, 2 steps, guidance, 16 leaves", 1.0),
    ("llm-update", "LLM update: 16 x 128 tokens", 1.0),
    ("iteration", "Dual-GRPO iteration: 4 prompts, J = 4, K = 4", 1.6),
    ("load", "loading a file of 1 GiB", 1.0),
]
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj",
           "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
LETTERS = "system\nDescribe the image by detailing the color, shape, size, texture, quantity, " \
    "text, spatial relationships of the objects and background:"


class Rust:
    """The other side: crates/models/examples/speed, one piece a line."""

    def __init__(self, binary, folder, threads, clock):
        self.clock = clock
        self.process = subprocess.Popen([binary, "serve", folder, str(threads)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout.readline().strip() == "ready"

    def cpu(self):
        """Milliseconds that the process and its ranks have computed, all their threads."""
        own = pathlib.Path(f"/proc/{self.process.pid}/task")
        ranks = " ".join((task / "children").read_text() for task in own.iterdir()).split()
        tasks = [task for pid in [self.process.pid, *ranks]
                 for task in pathlib.Path(f"/proc/{pid}/task").iterdir()]
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6

    def run(self, name):
        before = self.cpu()
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline().split()
        if len(line) != 2 or line[0] != name:
            sys.exit(f"the Rust side failed at {name}")
        return self.cpu() - before if self.clock == "cpu" else float(line[1])


class Python:
    """transformers, diffusers, peft and safetensors, as a competent user calls them."""

    def __init__(self, folder, clock):
        import torch
        from diffusers import QwenImagePipeline
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.torch, self.folder = torch, folder
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.medium = QwenImagePipeline.from_pretrained(folder / "medium")
        self.small = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "small" / "text_encoder")
        generator = torch.Generator().manual_seed(1)
        self.noise = lambda *shape: torch.randn(*shape, generator=generator)
        self.prompt = torch.arange(60).repeat(16, 1)
        self.text, self.negative = self.noise(16, 20, 256), self.noise(16, 6, 256)
        self.x = self.noise(16, 64, 16)
        self.latents = self.noise(16, 4, 1, 16, 16)
        self.answers = torch.randint(0, 1900, (16, 188), generator=generator)
        self.tuned, _ = self.adapted()
        self.loop = Loop(self)

    def adapted(self):
        from diffusers import QwenImageTransformer2DModel
        from peft import LoraConfig, get_peft_model

        model = QwenImageTransformer2DModel.from_pretrained(self.folder / "medium" / "transformer")
        config = LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian",
                            target_modules=TARGETS)
        tuned = get_peft_model(model, config)
        return tuned, [p for p in tuned.parameters() if p.requires_grad]

    def run(self, name):
        start = self.now()
        getattr(self, name.replace("-", "_"))()
        return (self.now() - start) * 1e3

    def generate(self, model, count):
        out = model.generate(input_ids=self.prompt, attention_mask=self.torch.ones_like(self.prompt),
                             max_new_tokens=count, do_sample=True, top_k=0, eos_token_id=None,
                             pad_token_id=0)
        assert out.shape == (16, 60 + count)

    def tokens_medium_32(self):
        self.generate(self.medium.text_encoder, 32)

    def tokens_medium_128(self):
        self.generate(self.medium.text_encoder, 128)

    def tokens_small_32(self):
        self.generate(self.small, 32)

    def tokens_small_128(self):
        self.generate(self.small, 128)

    def velocity(self, model, x, time_, text, negative, mask=None):
        """Guided velocity, the branches one after the other (they differ in length)."""
        out = []
        for embeds, keys in ((text, mask), (negative, None)):
            out.append(model(hidden_states=x, encoder_hidden_states=embeds,
                             encoder_hidden_states_mask=keys,
                             timestep=time_.expand(len(x)), img_shapes=[[(1, 8, 8)]] * len(x),
                             return_dict=False)[0])
        combined = out[1] + 4.0 * (out[0] - out[1])
        return combined * (out[0].norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def batched(self, model, x, time_):
        """The same with both branches in one batch, the shorter text padded."""
        torch = self.torch
        pad = torch.zeros(16, 14, 256)
        text = torch.cat([self.text, torch.cat([self.negative, pad], 1)])
        mask = torch.ones(32, 20, dtype=torch.bool)
        mask[16:, 6:] = False
        out = model(hidden_states=torch.cat([x, x]), encoder_hidden_states=text,
                    encoder_hidden_states_mask=mask, timestep=time_.expand(32),
                    img_shapes=[[(1, 8, 8)]] * 32, return_dict=False)[0].chunk(2)
        combined = out[1] + 4.0 * (out[0] - out[1])
        return combined * (out[0].norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def dit_sampling(self, split=True):
        torch, model, x = self.torch, self.medium.transformer, self.x
        sigmas = torch.linspace(1, 0, 11)
        with torch.no_grad():
            for now, then in zip(sigmas, sigmas[1:]):
                if split:
                    v = self.velocity(model, x, now, self.text, self.negative)
                else:
                    v = self.batched(model, x, now)
                x = x + (then - now) * v

    def dit_sampling_batched(self):
        self.dit_sampling(split=False)

    def vae_decode(self):
        with self.torch.no_grad():
            self.medium.vae.decode(self.latents)

    def dit_update(self):
        loss = sum(self.velocity(self.tuned, self.x, self.torch.tensor(t), self.text,
                                 self.negative).square().mean() for t in (0.9, 0.8))
        loss.backward()

    def llm_update(self):
        logits = self.medium.text_encoder(input_ids=self.answers).logits[:, 59:-1]
        chosen = self.answers[:, 60:, None]
        logits.log_softmax(-1).gather(2, chosen).mean().backward()

    def iteration(self):
        self.loop.run()


class Loop:
    """A Dual-GRPO iteration written with the three libraries: batches as large as they go."""

    def __init__(self, side):
        from transformers import Qwen2_5_VLForConditionalGeneration

        torch = side.torch
        self.side, self.torch = side, torch
        folder = side.folder / "medium"
        self.llm = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
        self.dit, adapters = side.adapted()
        self.optimisers = [torch.optim.AdamW(self.llm.parameters(), lr=1e-5),
                           torch.optim.AdamW(adapters, lr=1e-5)]
        self.vae, self.tokenizer = side.medium.vae, side.medium.tokenizer

    def embed(self, texts):
        template = side_template()
        tokens = self.tokenizer([template.format(text) for text in texts], padding=True,
                                return_tensors="pt")
        states = self.llm(**tokens, output_hidden_states=True).hidden_states[-1]
        return states[:, 34:], tokens.attention_mask[:, 34:].bool()

    def log_probs(self, tokens):
        logits = self.llm(input_ids=tokens).logits[:, 59:-1]
        return logits.log_softmax(-1).gather(2, tokens[:, 60:, None]).squeeze(-1)

    def transition(self, x, index, sigmas, text, mask, negative, following=None):
        """One Flow-GRPO step; gives the next latents and their log-probability."""
        torch = self.torch
        now, then = sigmas[index], sigmas[index + 1]
        v = self.side.velocity(self.dit, x, now, text, negative, mask)
        std = (now / (1 - min(now, sigmas[1]))).sqrt() * 0.8
        dt = then - now
        mean = x * (1 + std**2 / (2 * now) * dt) + v * (1 + std**2 * (1 - now) / (2 * now)) * dt
        scale = std * (-dt).sqrt()
        if following is None:
            following = mean + scale * torch.randn_like(x)
        log_prob = -((following.detach() - mean) ** 2) / (2 * scale**2) - scale.log()
        return following, log_prob.mean((1, 2))

    def run(self):
        torch = self.torch
        window, sigmas = (1, 2), torch.linspace(1, 0, 11)
        with torch.no_grad():
            prompts = torch.stack([torch.arange(i, i + 60) for i in range(4)]).repeat_interleave(4, 0)
            tokens = self.llm.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64,
                do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
            old = self.log_probs(tokens)
            names = [f"the object {i} of the background {j}" for i in range(4) for j in range(4)]
            text, mask = self.embed(names)
            negative, _ = self.embed([" "])
            text, mask = text.repeat_interleave(4, 0), mask.repeat_interleave(4, 0)
            negative = negative.expand(64, -1, -1)
            x = torch.randn(64, 64, 16)
            kept, logs = [], []
            for index in range(10):
                if index in window:
                    kept.append(x)
                    x, log_prob = self.transition(x, index, sigmas, text, mask, negative)
                    logs.append(log_prob)
                else:
                    v = self.side.velocity(self.dit, x, sigmas[index], text, negative, mask)
                    x = x + (sigmas[index + 1] - sigmas[index]) * v
                if index == window[-1]:
                    kept.append(x)
            latents = x.view(64, 8, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(64, 4, 1, 16, 16)
            images = self.vae.decode(latents).sample
            rewards = images.mean((1, 2, 3, 4)).view(16, 4)
            spread = lambda r: (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-4)
            of_traces = spread(rewards.mean(-1).view(4, 4)).view(16, 1)
            of_leaves = spread(rewards).view(64)
        ratio = (self.log_probs(tokens) - old).exp()
        loss = -torch.min(ratio * of_traces, ratio.clamp(0.8, 1.28) * of_traces).mean()
        self.update(loss, 0)
        loss = 0
        for at, index in enumerate(window):
            _, new = self.transition(kept[at], index, sigmas, text, mask, negative, kept[at + 1])
            ratio = (new - logs[at]).exp()
            loss = loss - torch.min(ratio * of_leaves, ratio.clamp(1 - 1e-4, 1 + 1e-4) * of_leaves).mean()
        self.update(loss / len(window), 1)

    def update(self, loss, which):
        optimiser = self.optimisers[which]
        optimiser.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
        optimiser.step()


def side_template():
    return (f"<|im_start|>{LETTERS}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n"
            "<|im_start|>assistant\n")


class Fresh:
    """Loading, which happens once, when a process starts: each time in a new process, which says how long it
    took by the wall clock. In one that has run for a while it is chance whether freed memory is at hand."""

    def __init__(self, command, threads):
        self.command = [*map(str, command), str(threads)]

    def run(self, name):
        out = subprocess.run(self.command, check=True, capture_output=True, text=True)
        return float(out.stdout.split()[-1])


def load(folder, threads):
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    torch.zeros(1 << 20).clone()
    start = time.perf_counter()
    # load_file maps the file; a training program needs the weights in memory.
    parts = {name: part.clone() for name, part in load_file(folder / "large.safetensors").items()}
    took = time.perf_counter() - start
    assert len(parts) == 64
    print(took * 1e3)


def main():
    if sys.argv[1:2] == ["load"]:
        load(pathlib.Path(sys.argv[2]), int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", help="the example `speed` of crates/models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", help="pieces whose name contains this")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    OUT.mkdir(parents=True, exist_ok=True)
    folder = OUT / "models"
    if not (folder / "large.safetensors").is_file():
        subprocess.run([arguments.binary, "make", folder], check=True)
    loaders = (Fresh([arguments.binary, "load", folder], arguments.threads),
               Fresh([sys.executable, __file__, "load", folder], arguments.threads))
    sides = loaders
    if arguments.only != "load":
        sides = (Rust(arguments.binary, folder, arguments.threads, arguments.clock),
                 Python(folder, arguments.clock))
    print(f"\n{arguments.threads} threads a side, medians of {arguments.rounds} interleaved rounds, "
          f"{arguments.clock} clock\n")
    print(f"{'work':56} {'Duet':>10} {'Python':>10} {'ratio':>7} {'wanted':>7}")
    rows = []
    for name, what, wanted in PIECES:
        if arguments.only and arguments.only not in name:
            continue
        peers = [name] + ([f"{name}-batched"] if name == "dit-sampling" else [])
        ours, peer = loaders if name == "load" else sides
        for side in (ours, peer):
            side.run(name)
        mine, theirs = [], {one: [] for one in peers}
        for _ in range(arguments.rounds):
            mine.append(ours.run(name))
            for one in peers:
                theirs[one].append(peer.run(one))
        here = statistics.median(mine)
        there = min(statistics.median(times) for times in theirs.values())
        ratio = there / here
        print(f"{what:56} {here:7.0f} ms {there:7.0f} ms {ratio:6.2f}x {wanted:6.1f}x", flush=True)
        rows.append(results.row(name, here, there, ratio, "ms", f">= {wanted}"))
    results.record(rows)


if __name__ == "__main__":
    main()

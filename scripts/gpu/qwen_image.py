#!/usr/bin/env python3
"""Qwen-Image's transformer at its published size beside diffusers and PEFT, on one GPU, in the same run.

    qwen_image.py BINARY [options]      the example `qwen_image` of crates/models; see scripts/gpu/qwen_image.sh

Random weights; what is sampled is DiT alone, without text encoder and autoencoder. Both models do not fit on the GPU
at once, so each round starts ours, measures and ends it, then theirs: a process each, told and timed alike.

    sample   --leaves images from noise, --steps steps, guidance 4 with the norm rescaled, two branches
    train    one step: two denoising steps of a window replayed with gradients for rank-32 adapters on the twelve
             linear layers of each block, activations recomputed, gradients clipped, AdamW

diffusers does each piece twice, the branches one after the other (as its pipeline does) and in one batch; the quicker
one counts. It runs eagerly, as PyTorch sets it up by default; ours runs deterministic algorithms only, as always.

FLOPs are counted from the config: matrix products and attention, a multiplication and an addition each. Model FLOPs
utilisation (MFU) is what the work needs over what the GPU could have done at --peak-tflops. For training that is
forward and the gradients of activations, twice the forward pass: frozen weights want no gradients of their own. The
column `done` counts recomputation too, `x3` is the custom of counting a step as three forward passes.

Memory is the most that nvidia-smi says the GPU held beyond what it held at first, read ten times a second: context,
libtorch's reserves and all, so nothing else may use the GPU. On the CPU, which is for trying this script, it is the
process's peak, and no rows are written.

Rows `gpu-qwen-image-...` go to target/bench/results.json. Ends with `as expected` if everything ran and both sides
agree on shapes and counts.
"""

import argparse
import dataclasses
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import results  # noqa: E402

HEAD, JOINT, CHANNELS, TIME = 128, 3584, 64, 256
WINDOW, RANK, BRANCHES = 2, 32, 2
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
           "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
           "txt_mlp.net.2"]
# What is measured, and the names of it on each side.
PIECES = {
    "sample": {"ours": ["sample"], "theirs": ["sample", "sample-batched"]},
    "train": {"ours": ["train"], "theirs": ["train", "train-batched"]},
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", help="the example `qwen_image`; `peer`: be the other side")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--size", type=int, default=512, help="pixels along each side")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--leaves", type=int, default=1, help="images at a time")
    parser.add_argument("--text", type=int, default=64, help="tokens of either prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of a piece in a round, after one to warm up")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="the GPU's; H100's and H200's in dense bf16")
    parser.add_argument("--deadline-s", type=float, default=600.0, help="for each answer of a side")
    return parser.parse_args()


def arguments_of(options):
    """What both sides are told."""
    names = ["device", "dtype", "layers", "heads", "size", "steps", "leaves", "text", "threads"]
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]


class Side:
    """A process that says `ready PARAMETERS` and then answers a piece with `NAME SECONDS FINDING`."""

    def __init__(self, name, command, deadline_s):
        self.name, self.deadline_s = name, deadline_s
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        self.parameters = int(self.answer("ready", 2)[1])

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def answer(self, name, words):
        """The next line; without one before the deadline, or with another, everything ends."""
        try:
            line = self.lines.get(timeout=self.deadline_s)
        except queue.Empty:
            self.process.kill()
            sys.exit(f"{self.name} did not answer `{name}` within {self.deadline_s:.0f} s")
        found = line.split()
        if len(found) != words or found[0] != name:
            self.process.kill()
            sys.exit(f"{self.name} ended or said {line.strip()!r} where `{name}` was due")
        return found

    def run(self, name):
        """Seconds, and what was found."""
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            sys.exit(f"{self.name} ended before `{name}`")
        _, seconds, finding = self.answer(name, 3)
        return float(seconds), finding

    def end(self):
        self.process.stdin.close()
        try:
            code = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            sys.exit(f"{self.name} did not end within 60 s")
        if code != 0:
            sys.exit(f"{self.name} ended with {code}")


class GpuMemory:
    """The most memory of the GPU in use since `reset`, beyond what was in use at first."""

    def __init__(self):
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            sys.exit(f"nvidia-smi does not run, so memory cannot be measured: {error}")
        if asked.returncode != 0 or not asked.stdout.strip().isdigit():
            sys.exit(f"nvidia-smi does not say what GPU {gpu} holds: {asked.stdout}{asked.stderr}")
        self.before = int(asked.stdout)
        self.highest = self.before
        self.process = subprocess.Popen([*command, "--loop-ms=100"], text=True, stdout=subprocess.PIPE)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.highest = max(self.highest, int(line))

    def reset(self):
        self.highest = self.before

    def peak(self, _side):
        # Libtorch keeps what it once reserved, so a reading that comes late still sees it.
        time.sleep(0.5)
        if self.process.poll() is not None:
            sys.exit(f"nvidia-smi ended with {self.process.returncode}")
        if self.highest == self.before:
            sys.exit("nvidia-smi saw no memory of the GPU taken: is CUDA_VISIBLE_DEVICES the GPU that it watches?")
        return (self.highest - self.before) << 20

    def end(self):
        self.process.kill()
        self.process.wait(timeout=60)


class HostMemory:
    """A process's peak so far, in place of the GPU's."""

    def reset(self):
        pass

    def peak(self, side):
        status = pathlib.Path(f"/proc/{side.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))

    def end(self):
        pass


class Peer:
    """diffusers and PEFT, as a competent user calls them."""

    def __init__(self, options):
        import torch
        from diffusers import QwenImageTransformer2DModel

        self.torch, self.options = torch, options
        self.cuda = options.device == "cuda"
        torch.set_num_threads(options.threads)
        torch.manual_seed(1)
        dtype = getattr(torch, options.dtype)
        # Made where it stays and in its own dtype: in fp32 it would not leave room for anything else.
        torch.set_default_dtype(dtype)
        with torch.device(options.device):
            model = QwenImageTransformer2DModel(
                num_layers=options.layers, num_attention_heads=options.heads, attention_head_dim=HEAD,
                joint_attention_dim=JOINT, in_channels=CHANNELS, out_channels=16, patch_size=2,
                axes_dims_rope=(16, 56, 56))
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(False)
                if name.endswith("weight") and parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 0.02)
        self.model, self.tuned = model, None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.side = options.size // 16
        self.latents = (options.leaves, self.side**2, CHANNELS)
        randn = lambda *shape: torch.randn(*shape, device=options.device)
        self.noise = lambda: randn(*self.latents)
        self.texts = [randn(1, options.text, JOINT).to(dtype).expand(options.leaves, -1, -1) for _ in range(BRANCHES)]
        self.kept = [self.noise() for _ in range(WINDOW + 1)]
        self.dtype = dtype
        self.sigmas = torch.linspace(1, 0, options.steps + 1).tolist()
        start = min(1, options.steps - WINDOW)
        self.window = range(start, start + WINDOW)
        self.last = None

    def settle(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def run(self, name):
        piece, _, how = name.partition("-")
        if piece == "train" and self.tuned is None:
            self.adapt()
        if self.cuda and name != self.last:
            self.torch.cuda.empty_cache()
        self.last = name
        self.settle()
        start = time.perf_counter()
        found = {"sample": self.sample, "train": self.train}[piece](how == "batched")
        self.settle()
        return time.perf_counter() - start, found

    def adapt(self):
        from peft import LoraConfig, get_peft_model

        self.model.enable_gradient_checkpointing()
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, init_lora_weights="gaussian", target_modules=TARGETS)
        self.tuned = get_peft_model(self.model, config)
        self.tuned.train()
        self.adapters = [parameter for parameter in self.tuned.parameters() if parameter.requires_grad]
        self.optimiser = self.torch.optim.AdamW(self.adapters, lr=1e-5)

    def velocity(self, model, x, index, batched):
        """Guided velocity, fp32."""
        torch, now = self.torch, self.sigmas[index]
        x = x.to(self.dtype)

        def ask(latents, text):
            times = torch.full((len(latents),), now, device=latents.device, dtype=self.dtype)
            return model(hidden_states=latents, encoder_hidden_states=text, timestep=times,
                         img_shapes=[[(1, self.side, self.side)]] * len(latents), return_dict=False)[0]

        if batched:
            with_prompt, without = ask(torch.cat([x, x]), torch.cat(self.texts)).float().chunk(2)
        else:
            with_prompt, without = (ask(x, text).float() for text in self.texts)
        combined = without + 4.0 * (with_prompt - without)
        return combined * (with_prompt.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def transition(self, x, index, velocity):
        """Mean and standard deviation of a Flow-GRPO step."""
        now, then = self.sigmas[index], self.sigmas[index + 1]
        dt = then - now
        std = 0.8 * (now / (1 - min(now, self.sigmas[1]))) ** 0.5
        drift = std**2 / (2 * now)
        return x * (1 + drift * dt) + velocity * (1 + drift * (1 - now)) * dt, std * (-dt) ** 0.5

    def sample(self, batched):
        torch, x = self.torch, self.noise()
        with torch.no_grad():
            for index in range(self.options.steps):
                velocity = self.velocity(self.model, x, index, batched)
                if index in self.window:
                    mean, scale = self.transition(x, index, velocity)
                    x = mean + scale * self.noise()
                else:
                    x = x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity
            if not x.isfinite().all():
                raise SystemExit("a latent is not finite after sampling")
        return "x".join(map(str, x.shape))

    def train(self, batched):
        loss = 0.0
        for at, index in enumerate(self.window):
            velocity = self.velocity(self.tuned, self.kept[at], index, batched)
            mean, scale = self.transition(self.kept[at], index, velocity)
            loss = loss + ((self.kept[at + 1] - mean) ** 2).mean() / (2 * scale**2)
        self.optimiser.zero_grad()
        (loss / WINDOW).backward()
        norm = self.torch.nn.utils.clip_grad_norm_(self.adapters, 1.0).item()
        if not 0 < norm < float("inf"):
            raise SystemExit(f"the gradient's norm is {norm}")
        self.optimiser.step()
        return str(sum(parameter.numel() for parameter in self.adapters))


def serve(options):
    peer = Peer(options)
    peer.settle()
    print("ready", peer.parameters, flush=True)
    for line in sys.stdin:
        name = line.strip()
        seconds, found = peer.run(name)
        print(name, seconds, found, flush=True)


def forward_flops(options):
    """One image through the transformer once: of the model itself, and of its adapters' share."""
    width, layers = options.heads * HEAD, options.layers
    image, text = (options.size // 16) ** 2, options.text
    both = image + text
    # q, k, v, output and a fourfold MLP for every token; two modulations of six vectors each.
    linear = 12 * width * width * both + 2 * 6 * width * width
    attention = 2 * both * both * width
    around = (image * CHANNELS * width + text * JOINT * width + TIME * width + width * width + 2 * width * width
              + image * width * CHANNELS)
    # Four layers of width by width and two of four times that: in and out of each adapter.
    adapters = layers * RANK * (4 * 2 + 2 * 5) * width * both
    return 2 * (layers * linear + around), 2 * layers * attention, 2 * adapters


def piece_flops(options):
    """For each piece: what it needs, what is done with recomputation, and what custom counts."""
    linear, attention, adapters = forward_flops(options)
    sampled = options.leaves * BRANCHES * options.steps * (linear + attention)
    trained = options.leaves * BRANCHES * WINDOW
    # Attention's backward pass and the adapters' have two products for each of the forward pass; a frozen layer's one.
    needed = trained * (2 * linear + 3 * attention + 3 * adapters)
    again = trained * (linear + attention + adapters)
    return {"sample": (sampled, sampled, sampled),
            "train": (needed, needed + again, 3 * trained * (linear + attention))}


@dataclasses.dataclass
class Found:
    """What a side was seen to do with one of its ways of doing a piece."""

    seconds: list = dataclasses.field(default_factory=list)
    memory: int = 0
    finding: str = ""


def measure(options, memory, found, parameters):
    """One round: ours from start to end, then theirs."""
    rest = arguments_of(options)
    commands = {"ours": [options.binary, *rest], "theirs": [sys.executable, __file__, "peer", *rest]}
    for name, command in commands.items():
        side = Side(name, command, options.deadline_s)
        parameters[name] = side.parameters
        for piece, ways in PIECES.items():
            for way in ways[name]:
                one = found.setdefault((piece, name, way), Found())
                memory.reset()
                side.run(way)
                for _ in range(options.repeats):
                    seconds, one.finding = side.run(way)
                    one.seconds.append(seconds)
                one.memory = max(one.memory, memory.peak(side))
                print(f"{name:7} {way:15} {' '.join(f'{s:.3f}' for s in one.seconds)} s", flush=True)
        side.end()


def report(options, found):
    """Prints the figures; gives the rows."""
    rows, flops = [], piece_flops(options)
    print(f"\n{'work':8} {'side':7} {'way':15} {'seconds':>9} {'images/s':>9} {'TFLOP/s':>9} {'MFU':>7} {'done':>7} "
          f"{'x3':>7} {'peak GiB':>9}")
    for piece in PIECES:
        best = {}
        for (of, name, way), one in found.items():
            if of != piece:
                continue
            seconds = statistics.median(one.seconds)
            shares = [each / seconds / options.peak_tflops / 1e12 for each in flops[piece]]
            others = " ".join(f"{share:7.2%}" for share in shares[1:]) if piece == "train" else f"{'':7} {'':7}"
            print(f"{piece:8} {name:7} {way:15} {seconds:9.3f} {options.leaves / seconds:9.3f} "
                  f"{flops[piece][0] / seconds / 1e12:9.3f} {shares[0]:7.2%} {others} {one.memory / 2**30:9.2f}")
            if name not in best or seconds < best[name][0]:
                best[name] = (seconds, shares[0], one)
        (mine, my_share, my), (their_seconds, their_share, their) = best["ours"], best["theirs"]
        if my.finding != their.finding:
            sys.exit(f"{piece}: ours found {my.finding}, theirs {their.finding}")
        rate, their_rate = options.leaves / mine, options.leaves / their_seconds
        print(f"{piece:8} ours / theirs: {rate / their_rate:.2f} of the images/s, "
              f"{my.memory / max(their.memory, 1):.2f} of the memory")
        label = f"gpu-qwen-image-{piece}"
        rows += [results.row(label, rate, their_rate, rate / their_rate, "images/s", ""),
                 results.row(f"{label}-mfu", my_share, their_share, my_share / their_share, "of the peak", ""),
                 results.row(f"{label}-memory", my.memory, their.memory, my.memory / max(their.memory, 1), "bytes", "")]
    return rows


def main():
    options = parse()
    if options.binary == "peer":
        return serve(options)
    if options.rounds < 1 or options.repeats < 1:
        sys.exit("--rounds and --repeats want whole numbers above zero")
    memory = GpuMemory() if options.device == "cuda" else HostMemory()
    found, parameters = {}, {}
    try:
        for _ in range(options.rounds):
            measure(options, memory, found, parameters)
    finally:
        memory.end()
    if parameters["ours"] != parameters["theirs"]:
        sys.exit(f"ours has {parameters['ours']} parameters, theirs {parameters['theirs']}")
    print(f"\n{parameters['ours'] / 1e9:.2f} B parameters in {options.dtype}, {options.size} x {options.size} pixels, "
          f"{options.steps} steps, {options.leaves} at a time, medians of {options.rounds} x {options.repeats}; "
          f"utilisation of {options.peak_tflops:.0f} TFLOP/s")
    rows = report(options, found)
    if options.device == "cuda":
        results.record(rows)
    print("as expected")


if __name__ == "__main__":
    main()

"""Writes the fixtures that crates/models is compared with: tiny random models of the real libraries,
their inputs, outputs and gradients.

    python scripts/parity/generate.py crates/models/tests/fixtures

Everything is float32 (gradients of images: from double precision) on one CPU thread; the same versions (requirements.txt) give the same bytes on the same processor.
"""

import argparse
import copy
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file


def write(folder, name, config, tensors):
    """One case: tensors in safetensors, everything else as JSON in its metadata."""
    single = lambda value: value.float() if value.dtype == torch.float64 else value
    tensors = {key: single(value.detach()).contiguous().clone() for key, value in tensors.items()}
    metadata = {"config": json.dumps(config, sort_keys=True)}
    save_file(dict(sorted(tensors.items())), folder / f"{name}.safetensors", metadata=metadata)


def shake(model, seed, scale=0.08):
    """Random values everywhere, also in norms and biases, so that every path shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            size = fan**-0.5 if parameter.dim() > 1 else scale
            base = 1.0 if name.endswith(("norm.weight", "gamma")) or "norm" in name and parameter.dim() == 1 else 0.0
            parameter.copy_(base + noise * size)
    return model.eval()


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(model, prefix="w."):
    return {prefix + name: parameter for name, parameter in model.state_dict().items()}


def gradients(model, prefix="grad."):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {prefix + name: grad for name, grad in found.items()}


def language(folder):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    cases = [("ratio1_tied", 3, 3, 8, True), ("ratio2", 4, 2, 6, False), ("ratio7", 7, 1, 4, False)]
    for index, (name, heads, kv, dim, tied) in enumerate(cases):
        half = dim // 2
        section = [half - 2 * (half // 3), half // 3, half // 3]
        text = dict(
            vocab_size=60, hidden_size=heads * dim, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=128,
            rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1, pad_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=section),
        )
        vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2,
                      out_hidden_size=heads * dim, fullatt_block_indexes=[0])
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=57,
                                  video_token_id=58, vision_start_token_id=55,
                                  vision_end_token_id=56, tie_word_embeddings=tied)
        model = shake(Qwen2_5_VLForConditionalGeneration(config), 10 + index)
        tokens = torch.randint(2, 50, (3, 11), generator=torch.Generator().manual_seed(index))
        left = torch.ones(3, 11, dtype=torch.long)
        left[0, :4] = 0
        left[2, :1] = 0
        right = left.flip(1)
        out = {"in.tokens": tokens, "in.left": left, "in.right": right}
        for side, mask in [("left", left), ("right", right), ("none", None)]:
            result = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            out[f"out.hidden.{side}"] = result.hidden_states[-1]
            out[f"out.logits.{side}"] = result.logits
        logs = model(input_ids=tokens).logits.log_softmax(-1)
        picked = logs[:, :-1].gather(2, tokens[:, 1:, None])
        weigh = randn(99, *picked.shape)
        (picked * weigh).sum().backward()
        out["in.weigh"] = weigh.squeeze(-1)
        greedy = model.generate(input_ids=tokens[:1], max_new_tokens=24, do_sample=False,
                                eos_token_id=None, pad_token_id=0)
        out["out.greedy"] = greedy
        keep = lambda items: {
            k: v for k, v in items.items() if ".visual." not in k and not (tied and "lm_head" in k)
        }
        out |= keep(weights(model)) | keep(gradients(model))
        write(folder, f"lm_{name}", config.to_dict(), out)


def transformer(folder):
    from diffusers import QwenImageTransformer2DModel

    config = dict(patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=8,
                  num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4))
    # In double precision, as far as the library goes along (rotations and sinusoids are single): gradients
    # of norms in single precision are as far from what is exact as the tests allow, and differ by as
    # much from one processor to another.
    model = shake(QwenImageTransformer2DModel(**config), 1).double()
    out = weights(model)
    # name, batch, grid, text lengths (padded to the longest), times
    cases = [
        ("square", 2, (4, 4), [5, 5], [0.3, 0.3]),
        ("lengths", 3, (2, 6), [4, 7, 1], [0.9, 0.25, 0.5]),
        ("odd", 1, (3, 5), [6], [1.0]),
        ("pixel", 2, (1, 1), [3, 2], [0.02, 0.02]),
        ("long", 1, (2, 2), [512], [0.7]),
    ]
    for index, (name, batch, grid, lengths, times) in enumerate(cases):
        longest = max(lengths)
        latents = randn(20 + index, batch, grid[0] * grid[1], 8).double().requires_grad_()
        embeds = randn(40 + index, batch, longest, 12).double()
        mask = torch.tensor([[i < n for i in range(longest)] for n in lengths])
        embeds = (embeds * mask[..., None]).requires_grad_()
        model.zero_grad()
        result = model(
            hidden_states=latents, encoder_hidden_states=embeds, encoder_hidden_states_mask=mask,
            timestep=torch.tensor(times), img_shapes=[[(1, *grid)]] * batch, return_dict=False,
        )[0]
        weigh = randn(60 + index, *result.shape).double()
        (result * weigh).sum().backward()
        case = {"latents": latents, "embeds": embeds, "mask": mask.long(),
                "times": torch.tensor(times), "grid": torch.tensor(grid), "weigh": weigh}
        out |= {f"{name}.in.{key}": value for key, value in case.items()}
        out |= {f"{name}.out": result, f"{name}.grad.latents": latents.grad,
                f"{name}.grad.embeds": embeds.grad}
        if name in ("lengths", "odd"):
            out |= gradients(model, f"{name}.grad.w.")
    write(folder, "dit", dict(config, cases=[case[0] for case in cases]), out)


def autoencoder(folder):
    from diffusers import AutoencoderKLQwenImage

    cases = [
        ("vae_two", dict(base_dim=4, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1,
                         temperal_downsample=[False, True], latents_mean=[0.1, -0.2, 0.3],
                         latents_std=[1.5, 0.7, 2.0]), (8, 12), 85),
        ("vae_three", dict(base_dim=4, z_dim=2, dim_mult=[1, 1, 2, 2], num_res_blocks=1,
                           temperal_downsample=[False, True, True], latents_mean=[0.1, -0.2],
                           latents_std=[1.5, 0.7]), (8, 24), 6),
    ]
    for index, (name, config, size, seed) in enumerate(cases):
        # In double precision, and with weights that condition the gradients well: with most seeds the
        # libraries' own single precision is 1e-5 to 4e-5 away from what is exact, and differs by as much
        # from one processor to another.
        model = shake(AutoencoderKLQwenImage(**config), seed).double()
        images = randn(70 + index, 2, 3, *size).clamp(-1, 1).double().requires_grad_()
        moments = model.encode(images.unsqueeze(2)).latent_dist
        weigh = randn(75, *moments.mean.shape).double()
        ((moments.mean + moments.logvar) * weigh).sum().backward()
        out = weights(model) | {"in.images": images, "out.mean": moments.mean.squeeze(2),
                                "out.logvar": moments.logvar.squeeze(2), "in.weigh": weigh.squeeze(2),
                                "grad.images": images.grad}
        factor = 2 ** len(config["temperal_downsample"])
        latents = randn(80 + index, 2, config["z_dim"], size[0] // factor, size[1] // factor)
        latents = latents.double().requires_grad_()
        # The gradient would vanish where the clamp acts, so it is taken before the clamp.
        decoded = model.decode(latents.unsqueeze(2)).sample
        features = model.post_quant_conv(latents.unsqueeze(2))
        model.clear_cache()
        raw = model.decoder(features, feat_cache=model._feat_map, feat_idx=[0])
        weigh = randn(85, *raw.shape).double()
        (raw * weigh).sum().backward()
        out |= {"in.latents": latents, "out.decoded": decoded.squeeze(2), "out.raw": raw.squeeze(2),
                "in.weigh_decoder": weigh.squeeze(2), "grad.latents": latents.grad}
        if index == 0:
            out |= gradients(model)
        write(folder, name, config, out)


TEXTS = [
    "a red four", " ", "", "The number after three, in the colour of grass.", "12 + 30 = 42!",
    "naïve café — 数字 ４", "line\n\n  two\ttabs <|im_end|> end", "don't we'll I'M",
]


def small_tokenizer():
    from tokenizers import AddedToken, trainers
    from transformers import Qwen2Tokenizer

    template = QWEN_TEMPLATE.replace("<|im_start|>", "\n").replace("<|im_end|>", "\n")
    corpus = [template, "You are a helpful assistant.", "a red four", "The number after three"]
    blank = Qwen2Tokenizer(vocab={}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, show_progress=False,
        initial_alphabet=sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet()),
    )
    blank._tokenizer.train_from_iterator(corpus * 2, trainer)
    model = json.loads(blank._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, eos_token="<|im_end|>",
                               pad_token="<|endoftext|>")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
               "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True, normalized=False) for t in special]}
    )
    return tokenizer


QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


def pipeline(folder):
    """A whole folder, written by diffusers, and an image made by it."""
    from diffusers import (AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline,
                           QwenImageTransformer2DModel)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = small_tokenizer()
    identifier = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=len(tokenizer) + 5, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        rms_norm_eps=1e-6, bos_token_id=identifier("<|endoftext|>"),
        eos_token_id=identifier("<|im_end|>"),
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[0, 1, 1]),
    )
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=16,
                  fullatt_block_indexes=[0])
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=identifier("<|image_pad|>"),
        video_token_id=identifier("<|video_pad|>"), tie_word_embeddings=True,
        vision_start_token_id=identifier("<|vision_start|>"),
        vision_end_token_id=identifier("<|vision_end|>"),
    )
    encoder = shake(Qwen2_5_VLForConditionalGeneration(config), 31)
    dit = shake(QwenImageTransformer2DModel(
        patch_size=2, in_channels=12, out_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4)), 32)
    vae = shake(AutoencoderKLQwenImage(
        base_dim=4, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3], latents_std=[1.5, 0.7, 2.0]), 33)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
        max_image_seq_len=8192, shift_terminal=0.02)
    pipe = QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer,
                             transformer=dit)
    pipe.set_progress_bar_config(disable=True)
    target = folder / "pipeline"
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target)

    prompts = ["a red four", "The number after three, in the colour of grass."]
    width, height = 48, 32
    noise = randn(90, 2, (width // 8) * (height // 8), 12)
    out = {"in.noise": noise}
    for name, prompt in zip("ab", prompts):
        embeds, _ = pipe.encode_prompt(prompt)
        out[f"out.embeds.{name}"] = embeds[0]
    out["out.negative"] = pipe.encode_prompt(" ")[0][0]
    common = dict(prompt=prompts, negative_prompt=[" ", " "], true_cfg_scale=4.0, width=width,
                  height=height, num_inference_steps=6, latents=noise)
    with torch.no_grad():
        out["out.latents"] = pipe(**common, output_type="latent").images
        out["out.images"] = torch.from_numpy(pipe(**common, output_type="np").images)
    for index, sample in enumerate(TEXTS):
        ids = tokenizer(sample).input_ids
        out[f"out.ids.{index}"] = torch.tensor(ids, dtype=torch.long)
    out["out.sigmas"] = scheduler.sigmas
    # Longer than the 512 tokens that are kept: its end is cut off.
    long = "a red four, " * 300
    out["out.embeds.long"] = pipe.encode_prompt(long, max_sequence_length=512)[0][0]
    assert out["out.embeds.long"].shape[0] == 512
    write(folder, "pipeline",
          {"prompts": prompts, "texts": TEXTS, "size": [width, height], "long": long}, out)
    # The adapters change the models that they are put on: they come last.
    half_precision(folder, pipe)
    adapter(folder, dit)
    language_adapter(folder, encoder)


def adapter(folder, dit):
    """An adapter that PEFT made for the pipeline's transformer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian",
                        target_modules=["attn.to_q", "attn.add_k_proj", "img_mlp.net.2"])
    tuned = get_peft_model(dit, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(tuned.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    target = folder / "adapter"
    shutil.rmtree(target, ignore_errors=True)
    tuned.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    latents, embeds = randn(91, 2, 6, 12), randn(92, 2, 5, 16)
    result = tuned(hidden_states=latents, encoder_hidden_states=embeds,
                   timestep=torch.tensor([0.6, 0.6]), img_shapes=[[(1, 2, 3)]] * 2,
                   return_dict=False)[0]
    result.square().sum().backward()
    out = {"in.latents": latents, "in.embeds": embeds, "out": result} | {
        "grad." + name.replace(".default", ""): parameter.grad
        for name, parameter in tuned.named_parameters()
        if "lora_" in name and parameter.grad is not None
    }
    write(folder, "adapter", {}, out)


def language_adapter(folder, encoder):
    """An adapter that PEFT made for the pipeline's language model, its layers given by a pattern."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights="gaussian",
                        target_modules=r"model\.language_model\..*\.(q_proj|v_proj|down_proj)")
    tuned = get_peft_model(encoder, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sorted(tuned.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    target = folder / "adapter_lm"
    shutil.rmtree(target, ignore_errors=True)
    tuned.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    tokens = torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(5))
    result = tuned(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    result.square().sum().backward()
    out = {"in.tokens": tokens, "out": result} | {
        "grad." + name.replace(".default", ""): parameter.grad
        for name, parameter in tuned.named_parameters()
        if "lora_" in name and parameter.grad is not None
    }
    write(folder, "adapter_lm", {}, out)


def half_precision(folder, pipe):
    """What bf16 costs the libraries themselves: the pipeline's language model and transformer in both."""
    tokens = torch.randint(2, 200, (2, 40), generator=torch.Generator().manual_seed(6))
    latents, embeds = randn(93, 2, 24, 12), randn(94, 2, 20, 16)
    times = torch.tensor([0.7, 0.7])
    out = {"in.tokens": tokens, "in.latents": latents, "in.embeds": embeds, "in.times": times}
    encoder, dit = copy.deepcopy(pipe.text_encoder).eval(), copy.deepcopy(pipe.transformer).eval()
    with torch.no_grad():
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            encoder.to(kind), dit.to(kind)
            hidden = encoder(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
            drawn = dit(hidden_states=latents.to(kind), encoder_hidden_states=embeds.to(kind),
                        timestep=times.to(kind), img_shapes=[[(1, 4, 6)]] * 2, return_dict=False)[0]
            out |= {f"out.hidden.{name}": hidden.float(), f"out.drawn.{name}": drawn.float()}
    write(folder, "bfloat16", {}, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for part in (language, transformer, autoencoder, pipeline):
        part(folder)
        print(f"{part.__name__}: done")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{size / 1e6:.2f} MB in {folder}")


if __name__ == "__main__":
    main()

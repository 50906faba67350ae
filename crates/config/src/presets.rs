//! Presets: what public systems use, as a layer below the file.

/// Names and TOML of all presets.
pub const PRESETS: &[(&str, &str)] = &[
    ("t2g", include_str!("presets/t2g.toml")),
    ("flow-grpo", include_str!("presets/flow-grpo.toml")),
    ("flow-grpo-fast", include_str!("presets/flow-grpo-fast.toml")),
    ("mix-grpo", include_str!("presets/mix-grpo.toml")),
    ("dance-grpo", include_str!("presets/dance-grpo.toml")),
    ("grpo-guard", include_str!("presets/grpo-guard.toml")),
    ("diffusion-nft", include_str!("presets/diffusion-nft.toml")),
    ("dapo", include_str!("presets/dapo.toml")),
    ("dr-grpo", include_str!("presets/dr-grpo.toml")),
];

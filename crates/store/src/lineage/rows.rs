//! The tables.

use crate::lineage::column::table;

table! {
    /// A tree: one prompt of one iteration.
    PromptRow, "prompts" {
        /// Its place in the iteration.
        tree: u32,
        /// Row of the data set.
        row: u64,
        /// The raw prompt.
        prompt: String,
        /// The version that it was sampled with.
        policy_version: u64,
        /// Its seed, 64 hexadecimal digits.
        seed: String,
        /// `trained`, `zero-spread` or `failed`.
        fate: String,
        /// Why it failed; empty otherwise.
        reason: String,
    }
}

table! {
    /// A chain of thought.
    TraceRow, "traces" {
        /// The tree.
        tree: u32,
        /// Its number in the tree.
        trace: u32,
        /// The version that it was sampled with.
        policy_version: u64,
        /// Its tree's seed, 64 hexadecimal digits; the trace's follows from it and `trace`.
        seed: String,
        /// Who sampled it.
        worker: String,
        /// At which attempt.
        attempt: u32,
        /// The response.
        text: String,
        /// The refined prompt.
        refined_prompt: String,
        /// Whether the marker of the refined prompt was there.
        well_formed: bool,
        /// Response length in tokens.
        tokens: u32,
        /// `stop` or `length`.
        finish: String,
        /// Key of tokens, log-probs and embeddings.
        artifact: String,
    }
}

table! {
    /// An image.
    LeafRow, "leaves" {
        /// The tree.
        tree: u32,
        /// The trace.
        trace: u32,
        /// Its number below the trace.
        leaf: u32,
        /// The version that it was sampled with.
        policy_version: u64,
        /// Its tree's seed, 64 hexadecimal digits; the leaf's follows from it, `trace` and `leaf`.
        seed: String,
        /// Who rendered it.
        worker: String,
        /// At which attempt.
        attempt: u32,
        /// First step of the window.
        window_start: u32,
        /// Steps of the window.
        window_len: u32,
        /// Key of the sub-tree's latents, log-probs and images.
        artifact: String,
    }
}

table! {
    /// A component's score of an image.
    RewardRow, "rewards" {
        /// The tree.
        tree: u32,
        /// The trace.
        trace: u32,
        /// The leaf.
        leaf: u32,
        /// The component.
        component: String,
        /// `scored`, `failed` or `timed-out`.
        status: String,
        /// The number, if there is one: a failed score is missing, never zero.
        value: Option<f64>,
        /// Why there is none; empty otherwise.
        reason: String,
        /// Who scored it.
        worker: String,
        /// At which attempt.
        attempt: u32,
    }
}

table! {
    /// A reward and its advantage: of a trace in the LLM branch, of a leaf in the DiT branch.
    AdvantageRow, "advantages" {
        /// `llm` or `dit`.
        branch: String,
        /// The tree.
        tree: u32,
        /// The trace.
        trace: u32,
        /// The leaf; missing in the LLM branch.
        leaf: Option<u32>,
        /// R1 or R2; missing when a score is.
        reward: Option<f64>,
        /// Missing when it is not trained on.
        advantage: Option<f64>,
    }
}

table! {
    /// A committed optimiser step.
    UpdateRow, "updates" {
        /// The version after it.
        policy_version: u64,
        /// The version that its trees were sampled with.
        sampled_with: u64,
        /// Loss weight of the LLM branch.
        llm_weight: f64,
        /// Loss weight of the DiT branch.
        dit_weight: f64,
        /// First step of the window.
        window_start: u32,
        /// Steps of the window.
        window_len: u32,
        /// Hash over all trained tensors after it.
        weights_digest: String,
        /// Key of the LLM's weights; missing when they are the base model's.
        llm_weights: Option<String>,
        /// Key of the DiT's weights; missing when they are the base model's.
        dit_weights: Option<String>,
        /// Losses, ratios, norms: a JSON object.
        metrics: String,
    }
}

//! Bytes that a trainer rank holds between a forward pass and its backward pass.
//!
//! Counted from what autograd keeps of each operation of the models; a test of the trainer holds the
//! sums to what libtorch's allocator counts, on a CPU.

use super::Work;
use super::bytes::element;
use super::shapes::Shapes;
use duet_config::{Config, Device, Lora};

/// Stream widths that a block has in hand for a moment on its way back, beyond what it kept; in the
/// transformer besides the inner layer's gradient.
const IN_HAND: u64 = 3;
/// Widths of an MLP's inner layer in the transformer.
const MLP: u64 = 4;

/// How the layers of a model are trained.
#[derive(Clone, Copy)]
enum Learns<'a> {
    /// Every weight.
    All,
    /// Adapters on some layers.
    Adapter(&'a Lora),
    /// Nothing.
    None,
}

impl Learns<'_> {
    fn of<'a>(lora: &'a Option<Lora>, params: u64) -> Learns<'a> {
        match lora {
            _ if params == 0 => Learns::None,
            Some(lora) => Learns::Adapter(lora),
            None => Learns::All,
        }
    }

    fn all(self) -> bool {
        matches!(self, Learns::All)
    }

    /// Whether a layer of this name has an adapter.
    fn adapts(self, layer: &str) -> bool {
        let Learns::Adapter(lora) = self else { return false };
        let ends = |t: &String| layer.strip_suffix(t.as_str()).is_some_and(|s| s.ends_with('.'));
        lora.targets.iter().any(|target| layer == target || ends(target))
    }

    /// Bytes that linear layers keep of one input, a token: the input itself where weights are
    /// trained; its fp32 form for each adapter, which is the input itself where that is fp32.
    fn input(self, layers: &[&str], width: u64, element: u64) -> u64 {
        let Learns::Adapter(lora) = self else {
            return if self.all() { width * element } else { 0 };
        };
        let adapted = layers.iter().filter(|layer| self.adapts(layer)).count() as u64;
        let inputs = if element == 4 { adapted.min(1) } else { adapted };
        4 * (inputs * width + adapted * u64::from(lora.rank))
    }

    /// What an RMS norm keeps beyond its input, a token: on the CPU, where it is one kernel in fp32
    /// only, the input is kept in fp32, and so is the normed input for the gradient of the norm's
    /// weight.
    fn normed(self, device: Device, width: u64, element: u64) -> u64 {
        match device {
            Device::Cpu if element == 4 => 0,
            Device::Cpu => width * (4 - element + if self.all() { 4 } else { 0 }),
            Device::Cuda => 0,
        }
    }
}

/// Bytes of one kind of block.
struct Stack {
    blocks: u64,
    /// Passes through the stack whose activations are held together.
    passes: u64,
    /// What a block keeps.
    block: u64,
    /// What goes into a block.
    input: u64,
    /// What a block has in hand for a moment.
    in_hand: u64,
    /// What lies before and after the blocks.
    ends: u64,
    /// The largest gradients that a backward pass has in hand.
    gradients: u64,
}

impl Stack {
    /// The most that is held: at the end of the forward pass, or at the end of the backward pass,
    /// when one block is left.
    fn peak(&self, recompute: bool) -> u64 {
        let forward = match recompute {
            // A block is computed again and goes back while all other blocks' inputs wait.
            true => {
                let block = self.block + self.in_hand;
                self.passes * self.blocks * self.input + block.max(self.ends)
            }
            false => self.passes * self.blocks * self.block + self.ends.max(self.in_hand),
        };
        forward.max(self.gradients + self.block + self.in_hand)
    }
}

/// The larger of the two branches' peaks, with or without `recompute`.
pub fn peak(config: &Config, shapes: &Shapes, work: &Work, recompute: bool) -> u64 {
    let [llm, dit] = super::bytes::trained(config, shapes);
    let of = |params: u64, stack: Stack| if params > 0 { stack.peak(recompute) } else { 0 };
    of(llm, lm(config, shapes, work, llm)).max(of(dit, self::dit(config, shapes, work, dit)))
}

/// The language model over a tree: the prompt once, then J answers.
fn lm(config: &Config, shapes: &Shapes, work: &Work, trained: u64) -> Stack {
    let (el, device) = (element(config), config.workers.device);
    let learns = Learns::of(&config.llm.branch.lora, trained);
    let (d, f, kv) = (shapes.lm.hidden, shapes.lm.inner, shapes.lm.kv);
    let prefix = work.sequence - work.new_tokens;
    let answer = work.new_tokens.saturating_sub(1);
    let tokens = prefix + work.traces * answer;
    let seen = work.traces * (prefix + answer);
    let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    // The stream twice (each norm reads it), queries, what attention gives, keys and values.
    let mut token = 4 * d * el + 2 * kv * el;
    token += learns.input(&qkv, d, el) + learns.input(&["self_attn.o_proj"], d, el);
    token += 2 * learns.normed(device, d, el);
    token += learns.input(&["mlp.gate_proj", "mlp.up_proj"], d, el);
    // The gate before and after its activation, and what it gates.
    token += 3 * f * el + learns.input(&["mlp.down_proj"], f, el);
    // Each answer's keys and values with the prompt's before them; on CUDA one for each query head,
    // which the masked kernels want.
    let heads = if device == Device::Cuda { d } else { kv };
    let block = tokens * token + seen * 2 * heads * el;
    let predicted = work.traces * work.new_tokens;
    let states = d * el * if learns.all() { 3 } else { 1 };
    // Logits, their log-probabilities, and for the entropy the probabilities and their product,
    // fp32; the logits once more where a temperature divides them.
    let tables = if config.rollout.temperature == 1.0 { 4 } else { 5 };
    Stack {
        blocks: shapes.lm.layers,
        passes: 1,
        block,
        input: tokens * d * el,
        in_hand: tokens * IN_HAND * d * el,
        ends: predicted * (states + tables * 4 * shapes.lm.vocab),
        // The table's two, from the head and from the embedding, until both are there.
        gradients: in_hand(config, learns, 2 * d * shapes.lm.vocab),
    }
}

/// The transformer over the window of a sub-tree, whose steps are back-propagated together.
fn dit(config: &Config, shapes: &Shapes, work: &Work, trained: u64) -> Stack {
    let (el, device) = (element(config), config.workers.device);
    let learns = Learns::of(&config.dit.branch.lora, trained);
    let d = shapes.dit.width;
    let rows = work.leaves * work.passes;
    let image = stream(learns, &IMAGE, d, el, device);
    let text = stream(learns, &TEXT, d, el, device);
    Stack {
        blocks: shapes.dit.blocks,
        passes: work.window,
        block: rows * (work.image_tokens * image + work.text_tokens * text),
        input: rows * work.dit_tokens() * d * el,
        in_hand: rows * work.dit_tokens() * (IN_HAND + MLP) * d * el,
        ends: 0,
        // The largest layer's: six vectors of modulation.
        gradients: in_hand(config, learns, 6 * d * d),
    }
}

/// Names of a stream's layers below a block's.
struct Stream {
    modulation: &'static str,
    qkv: [&'static str; 3],
    out: &'static str,
    up: &'static str,
    down: &'static str,
}

const IMAGE: Stream = Stream {
    modulation: "img_mod.1",
    qkv: ["attn.to_q", "attn.to_k", "attn.to_v"],
    out: "attn.to_out.0",
    up: "img_mlp.net.0.proj",
    down: "img_mlp.net.2",
};
const TEXT: Stream = Stream {
    modulation: "txt_mod.1",
    qkv: ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    out: "attn.to_add_out",
    up: "txt_mlp.net.0.proj",
    down: "txt_mlp.net.2",
};

/// What a block keeps of one stream, a token.
fn stream(learns: Learns<'_>, names: &Stream, d: u64, el: u64, device: Device) -> u64 {
    // The stream twice (each norm reads it), queries and keys before and after norm and rotation,
    // values, what attention gives; the MLP before its activation.
    let mut bytes = (8 + MLP) * d * el;
    bytes += 2 * learns.normed(device, d, el);
    bytes += learns.input(&names.qkv, d, el) + learns.input(&[names.out], d, el);
    bytes += learns.input(&[names.up], d, el) + learns.input(&[names.down], MLP * d, el);
    // What the two gates multiply, for the gates' own gradients.
    let gates = learns.all() || learns.adapts(names.modulation);
    bytes + if gates { 2 * d * el } else { 0 }
}

/// The gradients of so many weights, which a backward pass has in hand until it gives them away; those of
/// adapters are not worth counting.
fn in_hand(config: &Config, learns: Learns<'_>, weights: u64) -> u64 {
    if learns.all() { weights * element(config) } else { 0 }
}

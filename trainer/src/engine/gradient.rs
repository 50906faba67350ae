//! The gradient of a branch: summed over micro-batches and ranks, whole or in shares.
//!
//! ```text
//! backward: leaf's gradient -> its buckets' local sums -> bucket complete? begin its sum over ranks
//!           (each bucket once in an update, or once in a micro-batch; in the same order on all ranks)
//! after:    buckets that no gradient completed -> begun too -> all awaited -> the update's sums
//! ```
//! Local sums are fp32. A bucket that is summed over ranks once in an update adds up in the memory of
//! its sum; otherwise in memory of its own, which is given back afterwards.

use super::layout::{Layout, Seat, Span};
use super::norm::{ExactSum, WORDS, add_squares};
use crate::error::TrainError;
use duet_torch::Tensors;
use duet_torch::collective::{Begun, Collective};
use std::collections::VecDeque;
use tch::{Device, Kind, Tensor};

/// Buckets that may be under way when their memory is their own.
const MOST_UNDER_WAY: usize = 4;

/// How gradients are summed over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharing {
    /// 0: every rank holds all; 1: the optimiser's state is shared out; 2: gradients too.
    pub zero: u32,
    /// Sum over ranks after each micro-batch, not once an update.
    pub each_micro_batch: bool,
    /// Begin while the backward pass still runs.
    pub overlap: bool,
    /// Most bytes of a bucket.
    pub bucket_bytes: usize,
}

/// The gradient.
pub struct Gradient {
    layout: Layout,
    sharing: Sharing,
    device: Device,
    sums: Sums,
    /// Local sums of buckets with memory of their own, since their last sum over ranks.
    local: Vec<Option<Tensor>>,
    /// Whether a bucket's sum holds something of this update.
    held: Vec<bool>,
    /// In which order buckets begin. Changes no number.
    order: Vec<usize>,
    /// In which order they were complete in the last backward pass that began any.
    seen: Vec<usize>,
    /// Whether the order is one that was seen.
    learned: bool,
}

/// Sums over ranks.
enum Sums {
    /// The whole row.
    Row(Tensor),
    /// This rank's share of each bucket.
    Shares(Vec<Tensor>),
}

/// The sums over ranks of one update.
pub struct Reduction<'g> {
    group: &'g dyn Collective,
    /// Micro-batches of this rank, and how many are over.
    micro_batches: (u32, u32),
    /// Sums of each bucket that all ranks make, and how many are begun.
    rounds: (u32, u32),
    /// Buckets begun in the round at hand, as places in the order.
    begun: usize,
    under_way: VecDeque<UnderWay<'g>>,
    /// Parameters whose gradient a bucket still waits for in this backward pass.
    waits: Vec<usize>,
}

/// A bucket's sum over ranks.
struct UnderWay<'g> {
    bucket: usize,
    /// Its memory, where that is not the sums' own.
    local: Option<Tensor>,
    begun: Begun<'g>,
}

/// A stretch of a parameter whose sum this rank has, and takes the optimiser's step for.
pub struct Own {
    /// The parameter's name; with the stretch behind it where it is not the whole of it.
    pub name: String,
    /// Which parameter, in natural order.
    pub param: usize,
    /// Where in the flattened parameter it begins.
    pub from: i64,
    /// How many elements.
    pub len: i64,
    /// Its sum: a view, 1-D.
    pub grad: Tensor,
}

impl Gradient {
    /// Of `params`, all on one device.
    ///
    /// # Errors
    /// libtorch cannot allocate.
    pub fn new(params: &Tensors, seat: Seat, sharing: Sharing) -> Result<Gradient, TrainError> {
        let layout = Layout::new(params, seat, sharing.bucket_bytes / 4);
        let device = params.values().next().map_or(Device::Cpu, Tensor::device);
        let zeros = |len: i64| Tensor::f_zeros([len], (Kind::Float, device));
        let count = layout.buckets().len();
        let sums = match sharing.zero >= 2 && seat.world > 1 {
            true => {
                let share = |bucket| {
                    let share = layout.share(bucket);
                    zeros(share.end - share.start)
                };
                Sums::Shares((0..count).map(share).collect::<Result<_, _>>()?)
            }
            false => Sums::Row(zeros(layout.total())?),
        };
        let (local, held) = ((0..count).map(|_| None).collect(), vec![false; count]);
        // What a model computes last, its gradient comes first.
        let order = (0..count).rev().collect();
        Ok(Gradient {
            layout,
            sharing,
            device,
            sums,
            local,
            held,
            order,
            seen: Vec::new(),
            learned: false,
        })
    }

    /// Where everything lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether this rank has its share of the sums only.
    pub fn is_shared(&self) -> bool {
        self.sharing.zero > 0 && self.layout.seat().world > 1
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        match &mut self.sums {
            Sums::Row(row) => drop(row.zero_()),
            Sums::Shares(shares) => shares.iter_mut().for_each(|share| drop(share.zero_())),
        }
        self.local.iter_mut().for_each(|local| *local = None);
        self.held.fill(false);
    }

    /// Begins an update in which this rank has `own` micro-batches and the one that has most `most`.
    pub fn reduction<'g>(
        &self,
        group: &'g dyn Collective,
        own: u32,
        most: u32,
    ) -> Result<Reduction<'g>, TrainError> {
        let seat = Seat { rank: group.rank(), world: group.world() };
        if seat != self.layout.seat() {
            let reason = format!("laid out for {:?}, asked to sum as {seat:?}", self.layout.seat());
            return Err(TrainError::Protocol(reason));
        }
        let rounds = match seat.world {
            1 => 0,
            _ if self.sharing.each_micro_batch => most,
            _ => 1,
        };
        Ok(Reduction {
            group,
            micro_batches: (own, 0),
            rounds: (rounds, 0),
            begun: 0,
            under_way: VecDeque::new(),
            waits: Vec::new(),
        })
    }

    /// Whether local sums have memory of their own.
    fn apart(&self) -> bool {
        let many = self.layout.seat().world > 1;
        many && (self.sharing.each_micro_batch || matches!(self.sums, Sums::Shares(_)))
    }

    /// Where a bucket's local sum is.
    fn local(&mut self, bucket: usize) -> Result<Tensor, TrainError> {
        let len = self.layout.bucket_len(bucket);
        if !self.apart()
            && let Sums::Row(row) = &self.sums
        {
            return Ok(row.f_narrow(0, self.layout.buckets()[bucket].start, len)?);
        }
        match &self.local[bucket] {
            Some(local) => Ok(local.shallow_clone()),
            None => {
                let local = Tensor::f_zeros([len], (Kind::Float, self.device))?;
                self.local[bucket] = Some(local.shallow_clone());
                Ok(local)
            }
        }
    }

    /// Says that a backward pass begins.
    pub fn begin_pass(&mut self, reduction: &mut Reduction<'_>) {
        reduction.micro_batches.1 += 1;
        reduction.waits.clear();
        if !self.sums_now(reduction) {
            return;
        }
        self.seen.clear();
        if self.sharing.overlap {
            reduction.waits = vec![0; self.layout.buckets().len()];
            let spans = (0..self.layout.names().len()).flat_map(|param| self.layout.spans(param));
            spans.for_each(|span| reduction.waits[span.bucket] += 1);
        }
    }

    /// Whether the pass at hand ends with a sum over ranks.
    fn sums_now(&self, reduction: &Reduction<'_>) -> bool {
        let (own, over) = reduction.micro_batches;
        reduction.rounds.0 > 0 && (self.sharing.each_micro_batch || own == over)
    }

    /// Takes a parameter's gradient of the pass at hand.
    ///
    /// # Errors
    /// libtorch refuses, or a sum over ranks failed.
    pub fn take(
        &mut self,
        reduction: &mut Reduction<'_>,
        param: usize,
        grad: &Tensor,
    ) -> Result<(), TrainError> {
        let flat = grad.f_detach()?.f_contiguous()?.f_view(-1)?.f_to_kind(Kind::Float)?;
        for span in self.layout.spans(param).to_vec() {
            let mut sum = self.local(span.bucket)?.f_narrow(0, span.at, span.len)?;
            let _ = sum.f_add_(&flat.f_narrow(0, span.from, span.len)?)?;
            if let Some(waits) = reduction.waits.get_mut(span.bucket) {
                *waits -= 1;
                if *waits == 0 {
                    self.seen.push(span.bucket);
                }
            }
        }
        while let Some(bucket) = self.order.get(reduction.begun).copied() {
            if reduction.waits.get(bucket) != Some(&0) {
                break;
            }
            self.begin(reduction, bucket)?;
        }
        Ok(())
    }

    /// Says that the pass at hand is over: what is left of its sums over ranks begins.
    ///
    /// # Errors
    /// A sum over ranks failed.
    pub fn end_pass(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        if self.sums_now(reduction) {
            self.begin_rest(reduction)?;
        }
        Ok(())
    }

    /// Begins the buckets of the round at hand that are not begun.
    fn begin_rest(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        reduction.waits.clear();
        while let Some(bucket) = self.order.get(reduction.begun).copied() {
            self.begin(reduction, bucket)?;
        }
        reduction.begun = 0;
        reduction.rounds.1 += 1;
        Ok(())
    }

    fn begin(&mut self, reduction: &mut Reduction<'_>, bucket: usize) -> Result<(), TrainError> {
        if self.apart() && reduction.under_way.len() >= MOST_UNDER_WAY {
            self.await_one(reduction)?;
        }
        let sum = self.local(bucket)?;
        let begun = match self.is_shared() {
            true => reduction.group.begin_reduce_scatter(&sum)?,
            false => reduction.group.begin_all_reduce(&sum)?,
        };
        // The next micro-batch adds up elsewhere.
        let local = self.local[bucket].take();
        reduction.under_way.push_back(UnderWay { bucket, local, begun });
        reduction.begun += 1;
        Ok(())
    }

    fn await_one(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        let Some(UnderWay { bucket, local, begun }) = reduction.under_way.pop_front() else {
            return Ok(());
        };
        begun.wait()?;
        let first = !std::mem::replace(&mut self.held[bucket], true);
        let Some(local) = local else { return Ok(()) };
        let part = match self.is_shared() {
            true => {
                let share = self.layout.share(bucket);
                local.f_narrow(0, share.start, share.end - share.start)?
            }
            false => local,
        };
        let mut sum = self.sum(bucket)?;
        match first {
            true => sum.f_copy_(&part)?,
            false => drop(sum.f_add_(&part)?),
        }
        Ok(())
    }

    /// What this rank has of a bucket's sum: all, or its share.
    fn sum(&self, bucket: usize) -> Result<Tensor, TrainError> {
        match &self.sums {
            Sums::Shares(shares) => Ok(shares[bucket].shallow_clone()),
            Sums::Row(row) => {
                let start = self.layout.buckets()[bucket].start;
                let part = match self.is_shared() {
                    true => self.layout.share(bucket),
                    false => 0..self.layout.bucket_len(bucket),
                };
                Ok(row.f_narrow(0, start + part.start, part.end - part.start)?)
            }
        }
    }

    /// Begins all sums over ranks that this rank's micro-batches did not: where it had fewer than
    /// others, or broke off. The others wait for them.
    ///
    /// # Errors
    /// A sum over ranks failed.
    pub fn begin_all(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        while reduction.rounds.1 < reduction.rounds.0 {
            self.begin_rest(reduction)?;
        }
        Ok(())
    }

    /// Waits for all sums over ranks.
    ///
    /// # Errors
    /// A sum over ranks failed.
    pub fn finish(&mut self, reduction: &mut Reduction<'_>) -> Result<(), TrainError> {
        self.begin_all(reduction)?;
        while !reduction.under_way.is_empty() {
            self.await_one(reduction)?;
        }
        Ok(())
    }

    /// Has all ranks begin buckets in the order in which those of rank 0 were complete, from the next
    /// update on. Once for a group; it changes no number.
    ///
    /// # Errors
    /// The ranks cannot talk.
    pub fn learn_order(&mut self, group: &dyn Collective) -> Result<(), TrainError> {
        let count = self.order.len();
        if self.learned || !self.sharing.overlap || group.world() == 1 || count < 2 {
            return Ok(());
        }
        let mut order = std::mem::take(&mut self.seen);
        let mut placed = vec![false; count];
        order.iter().for_each(|bucket| placed[*bucket] = true);
        // Without a gradient of their own, or not seen: last, as they were.
        let known = !order.is_empty();
        order.extend(self.order.iter().copied().filter(|bucket| !placed[*bucket]));
        let mut message: Vec<i64> = order.into_iter().map(|bucket| bucket as i64).collect();
        message.push(i64::from(known));
        let message = Tensor::from_slice(&message);
        group.broadcast(&message, 0)?;
        let message = Vec::<i64>::try_from(&message)?;
        let (known, order) = message.split_last().map_or((&0, &[][..]), |split| split);
        self.order = order.iter().map(|bucket| *bucket as usize).collect();
        self.learned = *known == 1;
        Ok(())
    }

    /// The L2 norm over all parameters, the same bits on all ranks and however the sums are shared
    /// out, and the first parameter whose gradient is not finite.
    ///
    /// # Errors
    /// The ranks cannot talk.
    pub fn norm(&self, group: &dyn Collective) -> Result<(f64, Option<&str>), TrainError> {
        let mut squares = ExactSum::default();
        for bucket in 0..self.layout.buckets().len() {
            add_squares(&self.sum(bucket)?, &mut squares)?;
        }
        let mut bad = match squares.is_finite() {
            true => i64::MAX,
            false => {
                let own = self.own()?;
                let bad = own.iter().filter(|own| !duet_torch::all_finite([&own.grad]));
                bad.map(|own| own.param as i64).min().unwrap_or(i64::MAX)
            }
        };
        if self.is_shared() {
            let mut message: Vec<i64> = squares.words().iter().map(|word| *word as i64).collect();
            message.extend([i64::from(squares.is_finite()), bad]);
            let world = group.world() as usize;
            let all =
                Tensor::f_zeros([(world * message.len()) as i64], (Kind::Int64, Device::Cpu))?;
            group.all_gather(&all, &Tensor::from_slice(&message))?;
            squares = ExactSum::default();
            for one in Vec::<i64>::try_from(&all)?.chunks(message.len()) {
                let (words, rest) = one.split_at(WORDS);
                let words = std::array::from_fn(|at| words[at] as u64);
                squares.merge(&ExactSum::from_words(words, rest[0] == 1));
                bad = bad.min(rest[1]);
            }
        }
        let name = self.layout.names().get(bad as usize).map(String::as_str);
        Ok((squares.value().sqrt(), name))
    }

    /// Multiplies what this rank has of the sums.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn scale(&self, factor: f64) -> Result<(), TrainError> {
        for bucket in 0..self.layout.buckets().len() {
            let _ = self.sum(bucket)?.f_mul_scalar_(factor)?;
        }
        Ok(())
    }

    /// What this rank has the sum of.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn own(&self) -> Result<Vec<Own>, TrainError> {
        let layout = &self.layout;
        let name = |param: usize| layout.names()[param].clone();
        if let (Sums::Row(row), false) = (&self.sums, self.is_shared()) {
            let whole = |param: usize| {
                let first = layout.spans(param).first();
                let at = first.map_or(0, |span| layout.buckets()[span.bucket].start + span.at);
                let len = layout.len_of(param);
                let grad = row.f_narrow(0, at, len)?;
                Ok(Own { name: name(param), param, from: 0, len, grad })
            };
            return (0..layout.names().len()).map(whole).collect();
        }
        let own = |span: &Span| {
            let at = span.at - layout.share(span.bucket).start;
            let grad = self.sum(span.bucket)?.f_narrow(0, at, span.len)?;
            let Span { param, from, len, .. } = *span;
            Ok(Own { name: layout.name_of(span), param, from, len, grad })
        };
        layout.owned().iter().map(own).collect()
    }
}

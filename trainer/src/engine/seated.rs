//! What of a branch depends on a rank's place in its group: gradient, optimiser, averages.

use super::gradient::{Gradient, Own, Sharing};
use super::layout::{Seat, Span};
use super::settings::BranchSettings;
use crate::error::TrainError;
use duet_torch::Tensors;
use duet_torch::collective::Collective;
use duet_torch::optim::AdamW;
use tch::{Device, Kind, Tensor};

/// A branch's state as one rank holds it.
pub(super) struct Seated {
    /// The trained tensors, in the order of the gradient's layout.
    pub(super) leaves: Vec<Tensor>,
    pub(super) gradient: Gradient,
    /// What this rank takes steps for, by name: whole tensors, or flat stretches of them.
    pub(super) own: Vec<Own>,
    pub(super) params: Tensors,
    pub(super) grads: Tensors,
    pub(super) optimiser: AdamW,
    /// Moving average of what this rank takes steps for, where one is kept.
    pub(super) ema: Option<Tensors>,
}

impl Seated {
    /// A fresh state.
    pub(super) fn new(
        params: &Tensors,
        settings: &BranchSettings,
        seat: Seat,
        sharing: Sharing,
    ) -> Result<Seated, TrainError> {
        let gradient = Gradient::new(params, seat, sharing)?;
        let names = gradient.layout().names();
        let leaves: Vec<Tensor> = names.iter().map(|name| params[name].shallow_clone()).collect();
        let own = gradient.own()?;
        let (mut mine, mut grads) = (Tensors::new(), Tensors::new());
        for own in &own {
            let leaf = &leaves[own.param];
            let param = match own.len == leaf.numel() as i64 {
                true => leaf.detach(),
                false => leaf.f_detach()?.f_view(-1)?.f_narrow(0, own.from, own.len)?,
            };
            mine.insert(own.name.clone(), param);
            grads.insert(own.name.clone(), sum_of(own, leaf)?);
        }
        let optimiser = AdamW::new(settings.adamw, &mine)?;
        let copy = |(name, param): (&String, &Tensor)| (name.clone(), param.copy());
        let ema = (settings.ema > 0.0).then(|| mine.iter().map(copy).collect());
        Ok(Seated { leaves, gradient, own, params: mine, grads, optimiser, ema })
    }

    /// Fresh memory for the gradient, for a place that needs the same share of the state.
    pub(super) fn renew(
        &mut self,
        params: &Tensors,
        seat: Seat,
        sharing: Sharing,
    ) -> Result<(), TrainError> {
        // What there was goes before its successor comes.
        self.own.clear();
        self.grads.clear();
        self.gradient = Gradient::new(&Tensors::new(), seat, sharing)?;
        self.gradient = Gradient::new(params, seat, sharing)?;
        self.own = self.gradient.own()?;
        for own in &self.own {
            self.grads.insert(own.name.clone(), sum_of(own, &self.leaves[own.param])?);
        }
        Ok(())
    }

    /// Gives every rank what the others took steps for.
    pub(super) fn gather(&self, group: &dyn Collective) -> Result<(), TrainError> {
        let layout = self.gradient.layout();
        let owned = layout.owned();
        for bucket in 0..layout.buckets().len() {
            let spans: Vec<Span> = layout.within(bucket).copied().collect();
            let flat = |param: usize| self.leaves[param].f_detach()?.f_view(-1);
            // In the parameters' own type where they have one, so that half precision travels as such.
            let kinds = spans.iter().map(|span| self.leaves[span.param].kind());
            let kind = kinds.reduce(|a, b| if a == b { a } else { Kind::Float });
            let device = self.leaves.first().map_or(Device::Cpu, Tensor::device);
            let options = (kind.unwrap_or(Kind::Float), device);
            let whole = Tensor::f_zeros([layout.bucket_len(bucket)], options)?;
            let share = layout.share(bucket);
            let part = Tensor::f_zeros([share.end - share.start], options)?;
            for own in owned.iter().filter(|own| own.bucket == bucket) {
                let mut to = part.f_narrow(0, own.at - share.start, own.len)?;
                to.f_copy_(&flat(own.param)?.f_narrow(0, own.from, own.len)?)?;
            }
            // As bytes: they are copied, not computed with.
            let bytes = |tensor: &Tensor| tensor.f_view_dtype(Kind::Uint8);
            group.all_gather(&bytes(&whole)?, &bytes(&part)?)?;
            for span in spans {
                let mut to = flat(span.param)?.f_narrow(0, span.from, span.len)?;
                to.f_copy_(&whole.f_narrow(0, span.at, span.len)?)?;
            }
        }
        Ok(())
    }
}

/// The sum of what is owned of a parameter, in the parameter's shape where it is all of it.
fn sum_of(own: &Own, leaf: &Tensor) -> Result<Tensor, TrainError> {
    Ok(match own.len == leaf.numel() as i64 {
        true => own.grad.f_view(leaf.size().as_slice())?,
        false => own.grad.shallow_clone(),
    })
}

//! What a scorer is, and what becomes of its answers: every leaf gets a typed score for every
//! component, and a number only where a scorer gave a finite one (DU-8).

use duet_core::work::{LeafScores, PromptRow, Score};
use std::collections::BTreeSet;
use tch::Tensor;

/// The images of one trace and what they are to be judged against.
#[derive(Debug)]
pub struct Job {
    /// The raw prompt, with what scorers need to know of it.
    pub prompt: PromptRow,
    /// What the LLM made of it.
    pub refined_prompt: String,
    /// RGB, `u8 [K, H, W, 3]`.
    pub images: Tensor,
}

impl Job {
    /// K.
    pub fn leaves(&self) -> usize {
        usize::try_from(self.images.size().first().copied().unwrap_or(0)).unwrap_or(0)
    }
}

/// Something that scores images: a model in this process, or a service elsewhere. It lives on the
/// device thread, so it need not be `Send`.
pub trait Scorer {
    /// The components it scores (`semantic`, `aesthetic`, ...): the same at every call.
    fn components(&self) -> Vec<String>;

    /// One set of scores for each image of the job, in order. What it leaves out counts as failed.
    ///
    /// # Errors
    /// Why nothing at all could be scored, for a person.
    fn score(&mut self, job: &Job) -> Result<Vec<LeafScores>, String>;
}

/// Two scorers of one panel score the same component.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two scorers score `{0}`: take one of them out of [reward] scorers")]
pub struct Twice(pub String);

/// All scorers of a worker, as one.
#[derive(Default)]
pub struct Panel {
    scorers: Vec<Box<dyn Scorer>>,
}

impl Panel {
    /// A panel of these scorers.
    ///
    /// # Errors
    /// [`Twice`] when two of them score the same component.
    pub fn new(scorers: Vec<Box<dyn Scorer>>) -> Result<Panel, Twice> {
        let mut seen = BTreeSet::new();
        for component in scorers.iter().flat_map(|scorer| scorer.components()) {
            if !seen.insert(component.clone()) {
                return Err(Twice(component));
            }
        }
        Ok(Panel { scorers })
    }

    /// Every component, in name order.
    pub fn components(&self) -> BTreeSet<String> {
        self.scorers.iter().flat_map(|scorer| scorer.components()).collect()
    }

    /// Every component of every leaf. A scorer that fails takes no other with it.
    pub fn score(&mut self, job: &Job) -> Vec<LeafScores> {
        let mut all = vec![LeafScores::new(); job.leaves()];
        for scorer in &mut self.scorers {
            let components = scorer.components();
            let answer = scorer.score(job);
            for (leaf, scores) in
                complete(&components, job.leaves(), answer).into_iter().enumerate()
            {
                all[leaf].extend(scores);
            }
        }
        all
    }
}

/// Exactly `leaves` score sets with exactly `components`: what is missing, not finite or not asked
/// for is `Failed` with the reason, never a number.
fn complete(
    components: &[String],
    leaves: usize,
    answer: Result<Vec<LeafScores>, String>,
) -> Vec<LeafScores> {
    let all = |reason: &str| every(components, leaves, &Score::Failed(reason.to_owned()));
    let mut answer = match answer {
        Ok(answer) if answer.len() == leaves => answer,
        Ok(answer) => return all(&format!("{} answers for {leaves} images", answer.len())),
        Err(reason) => return all(&reason),
    };
    let one = |scores: &mut LeafScores, component: &String| {
        let score = match scores.remove(component) {
            Some(Score::Scored(value)) if !value.is_finite() => {
                Score::Failed(format!("the score is {value}, not a finite number"))
            }
            Some(score) => score,
            None => Score::Failed("the scorer left it out".to_owned()),
        };
        (component.clone(), score)
    };
    answer
        .iter_mut()
        .map(|scores| components.iter().map(|component| one(scores, component)).collect())
        .collect()
}

/// The same outcome for every component of every leaf.
pub fn every<'a>(
    components: impl IntoIterator<Item = &'a String>,
    leaves: usize,
    score: &Score,
) -> Vec<LeafScores> {
    let one: LeafScores = components.into_iter().map(|c| (c.clone(), score.clone())).collect();
    vec![one; leaves]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// A scorer that answers what it is told to.
    struct Scripted(Vec<&'static str>, Result<Vec<LeafScores>, String>);

    impl Scorer for Scripted {
        fn components(&self) -> Vec<String> {
            self.0.iter().map(|c| (*c).to_owned()).collect()
        }

        fn score(&mut self, _: &Job) -> Result<Vec<LeafScores>, String> {
            self.1.clone()
        }
    }

    fn job(leaves: i64) -> Job {
        let prompt = PromptRow { row: 0, text: "a red seven".to_owned(), meta: String::new() };
        let images = Tensor::zeros([leaves, 4, 4, 3], (Kind::Uint8, Device::Cpu));
        Job { prompt, refined_prompt: "A red 7.".to_owned(), images }
    }

    fn leaf(scores: &[(&str, Score)]) -> LeafScores {
        scores.iter().map(|(name, score)| ((*name).to_owned(), score.clone())).collect()
    }

    fn is_failed(score: &Score, part: &str) -> bool {
        matches!(score, Score::Failed(reason) if reason.contains(part))
    }

    /// DU-8: there is no number that no scorer gave.
    #[test]
    fn what_was_not_scored_is_failed_with_its_reason() {
        let answers = vec![
            leaf(&[("a", Score::Scored(0.5)), ("b", Score::Scored(f64::NAN))]),
            leaf(&[("b", Score::TimedOut(duet_core::Millis(9))), ("c", Score::Scored(1.0))]),
        ];
        let scorer = Scripted(vec!["a", "b"], Ok(answers));
        let got = Panel::new(vec![Box::new(scorer)]).unwrap().score(&job(2));
        assert_eq!(got[0]["a"], Score::Scored(0.5));
        assert!(is_failed(&got[0]["b"], "NaN"));
        assert!(is_failed(&got[1]["a"], "left it out"));
        assert_eq!(got[1]["b"], Score::TimedOut(duet_core::Millis(9)));
        assert_eq!(got[1].len(), 2, "what nobody asked for is dropped");
    }

    #[test]
    fn a_scorer_that_fails_takes_no_other_with_it() {
        let good = Scripted(vec!["a"], Ok(vec![leaf(&[("a", Score::Scored(0.25))]); 3]));
        let broken = Scripted(vec!["b"], Err("the model is not there".to_owned()));
        let short = Scripted(vec!["c"], Ok(vec![leaf(&[("c", Score::Scored(1.0))])]));
        let mut panel =
            Panel::new(vec![Box::new(good), Box::new(broken), Box::new(short)]).unwrap();
        let got = panel.score(&job(3));
        assert_eq!(got.len(), 3);
        for scores in &got {
            assert_eq!(scores["a"], Score::Scored(0.25));
            assert!(is_failed(&scores["b"], "not there"));
            assert!(is_failed(&scores["c"], "1 answers for 3 images"));
        }
    }

    #[test]
    fn a_component_has_one_scorer() {
        let scorer = || Box::new(Scripted(vec!["a"], Ok(Vec::new()))) as Box<dyn Scorer>;
        let error = Panel::new(vec![scorer(), scorer()]).err().unwrap();
        assert_eq!(error, Twice("a".to_owned()));
    }
}

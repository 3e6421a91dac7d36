//! What a training step is, beside its size.

use clap::ValueEnum;
use xllama::Error;
use xllama::compile::{Keep, Step};
use xllama::config::{LoraConfig, LoraProjection};

/// A step of AdamW over f32 masters and state.
#[derive(clap::Args)]
pub struct TrainArgs {
    /// What a block keeps for its gradient; the rest is computed once more [default: nothing to compile; to measure,
    /// dots on a CPU, everything elsewhere].
    #[arg(long, value_enum)]
    save: Option<SaveArg>,
    /// Run the batch in N parts, one after another, and sum their gradients.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub microbatches: u16,
    /// Train adapters of this rank beside all projections, and leave the parameters as they are.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..))]
    lora_rank: Option<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum SaveArg {
    /// All that the gradient reads.
    Everything,
    /// The results of products.
    Dots,
    /// Nothing but what goes into the block.
    Nothing,
}

impl TrainArgs {
    /// Refuses them for what is no training, which is asked for by `instead`.
    ///
    /// # Errors
    /// [`Error::Option`] with the first that is given.
    pub fn refuse(&self, instead: &str) -> Result<(), Error> {
        let given = [("save", self.save.is_some()), ("microbatches", self.microbatches != 1)];
        let given = given.into_iter().chain([("lora-rank", self.lora_rank.is_some())]);
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((name, _)) => {
                let what = format!("is for a training step; ask for one with {instead}");
                Err(Error::Option { name: name.into(), what })
            }
        }
    }

    /// What is kept.
    pub fn keep(&self, default: Keep) -> Keep {
        match self.save {
            None => default,
            Some(SaveArg::Everything) => Keep::Everything,
            Some(SaveArg::Dots) => Keep::Dots,
            Some(SaveArg::Nothing) => Keep::Nothing,
        }
    }

    /// The step over texts of so many tokens.
    pub fn step(&self, tokens: usize, default: Keep) -> Step {
        Step::Train { tokens, microbatches: self.microbatches.into(), keep: self.keep(default) }
    }

    /// Adapters with α twice their rank.
    pub fn lora(&self) -> Option<LoraConfig> {
        let projections = LoraProjection::ALL.to_vec();
        self.lora_rank.map(|r| LoraConfig { rank: r.into(), alpha: 2.0 * f64::from(r), dropout: 0.0, projections })
    }
}

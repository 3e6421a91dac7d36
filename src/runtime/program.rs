//! The programs that a model runs: one step over S tokens of B slots, in the forms that prefill, decode and the
//! checkers need. All have the same head of arguments: parameters, cache, tokens, position.

use xla::DType;
use xla::graph::{Graph, Module, Tensor};

use crate::Error;
use crate::config::ModelConfig;
use crate::generation::sampling::{SamplerArgs, SamplerSpec, sample};
use crate::kv_cache::{CacheShape, KvCache};
use crate::model;
use crate::params::{self, Llama, Param};

/// What a step gives back besides the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// The sampled next token (B, 1) and the next position (B).
    Token(SamplerSpec),
    /// Logits of all S positions, (B, S, V) f32.
    Logits,
    /// Logits and every named value of the model, for comparison with goldens.
    Activations,
}

/// A program, by everything that shapes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepSpec {
    /// B.
    pub batch: usize,
    /// S: tokens per slot in one run. 1 with [`Output::Token`] is the decode step.
    pub tokens: usize,
    /// T: cache positions per slot.
    pub cache_len: usize,
    /// Cache positions that attention reads.
    pub read_len: usize,
    /// Type of the cache.
    pub cache_dtype: DType,
    /// What comes back.
    pub output: Output,
}

impl StepSpec {
    /// True for the step that feeds itself: one token in, one token out, nothing from the host.
    pub fn is_decode(&self) -> bool {
        self.tokens == 1 && matches!(self.output, Output::Token(_))
    }

    /// The cache it runs on.
    pub fn cache(&self) -> CacheShape {
        CacheShape { batch: self.batch, len: self.cache_len, dtype: self.cache_dtype }
    }
}

/// Builds the step as a module.
///
/// Arguments: parameters (in declaration order), cache (donated), tokens (B, S), position (B); prefill with
/// [`Output::Token`] adds `valid` (B), how many of the S tokens count, `last` (B), 1 where the prompt ends here, and
/// `token` (B, 1), kept where it does not; then the sampler's. Results: cache, then what [`Output`] says, tokens and
/// positions first, the sampler's counts last.
pub fn build(spec: &StepSpec, params: &Llama<Param>, dtype: DType, cfg: &ModelConfig) -> Result<Module, Error> {
    let name = match spec.output {
        Output::Token(_) if spec.is_decode() => "decode",
        Output::Token(_) => "prefill",
        Output::Logits => "logits",
        Output::Activations => "activations",
    };
    let g = Graph::new(name);
    g.inline_calls(spec.output == Output::Activations);
    let p = params::declare_args(&g, params, dtype);
    let cache = KvCache::declare(&g, spec.cache(), cfg);
    let tokens = g.arg("tokens", DType::I32, &[spec.batch, spec.tokens]);
    let position = g.arg("position", DType::I32, &[spec.batch]);
    let step = Step { spec, p: &p, tokens, position, cfg };

    match spec.output {
        Output::Token(sampler) => step.token(&g, &cache, sampler),
        Output::Logits | Output::Activations => {
            let (hidden, new) = model::forward(&p, &step.tokens, &step.position, &cache, spec.read_len, cfg);
            step.output_cache(&g, &cache, &new);
            g.output("logits", &model::lm_head(&p, &hidden));
            if spec.output == Output::Activations {
                for (name, value) in g.taps().into_iter().filter(|(name, _)| name != "logits") {
                    g.output(&name, &value);
                }
            }
        }
    }
    Ok(g.finish()?)
}

struct Step<'a> {
    spec: &'a StepSpec,
    p: &'a Llama<Tensor>,
    tokens: Tensor,
    position: Tensor,
    cfg: &'a ModelConfig,
}

impl Step<'_> {
    fn output_cache(&self, g: &Graph, old: &KvCache<Tensor>, new: &KvCache<Tensor>) {
        for (i, (old, new)) in old.layers.iter().zip(&new.layers).enumerate() {
            g.output_aliased(&format!("cache/{i}/k"), &new.k, &old.k);
            g.output_aliased(&format!("cache/{i}/v"), &new.v, &old.v);
        }
    }

    fn token(&self, g: &Graph, cache: &KvCache<Tensor>, sampler: SamplerSpec) {
        let (b, s) = (self.spec.batch, self.spec.tokens);
        let prefill = (!self.spec.is_decode()).then(|| Prefill {
            valid: g.arg("valid", DType::I32, &[b]),
            last: g.arg("last", DType::I32, &[b]),
            token: g.arg("token", DType::I32, &[b, 1]),
        });
        let args = SamplerArgs::declare(g, sampler, b, self.cfg.vocab_size);
        let (hidden, new) = model::forward(self.p, &self.tokens, &self.position, cache, self.spec.read_len, self.cfg);
        self.output_cache(g, cache, &new);

        // Only the last position that counts goes through the head.
        let (hidden, next) = match &prefill {
            Some(prefill) => (last_row(&hidden, &prefill.valid), &self.position + &prefill.valid),
            None => (hidden, &self.position + s as i64),
        };
        let logits = model::lm_head(self.p, &hidden).reshape(&[b, self.cfg.vocab_size]);
        let sampled = sample(&logits, &next, &args);
        let token = sampled.reshape(&[b, 1]);
        let token = match &prefill {
            Some(prefill) => prefill.last.ne(0i64).reshape(&[b, 1]).select(&token, &prefill.token),
            None => token,
        };
        g.output("token", &token);
        g.output("position", &next);
        if let Some(counts) = &args.output_counts {
            let id = g.iota(DType::I32, counts.shape(), 1);
            let mut drawn = id.eq(&token.broadcast_to(counts.shape())).cast(DType::I32);
            if let Some(prefill) = &prefill {
                drawn = drawn * prefill.last.reshape(&[b, 1]).broadcast_to(counts.shape());
            }
            g.output_aliased("sampler/output_counts", &(counts + drawn), counts);
        }
    }
}

struct Prefill {
    valid: Tensor,
    last: Tensor,
    token: Tensor,
}

/// Row `valid − 1` of each slot (the first where nothing counts): (B, S, M), (B) → (B, 1, M).
fn last_row(hidden: &Tensor, valid: &Tensor) -> Tensor {
    let g = hidden.graph();
    let (b, m) = (hidden.dim(0), hidden.dim(2));
    let zero = g.scalar(0i64, DType::I32);
    let rows: Vec<Tensor> = (0..b)
        .map(|i| {
            let row = valid.narrow(0, i, 1).reshape(&[]) - 1i64;
            hidden.narrow(0, i, 1).dynamic_slice(&[&zero, &row, &zero], &[1, 1, m])
        })
        .collect();
    g.concatenate(&rows.iter().collect::<Vec<_>>(), 0)
}

//! What decode feeds back to itself: the tokens drawn last, and the sampler's arguments.

use xla::pjrt::HostRead;

use super::engine::Engine;
use super::placement::Array;
use crate::Error;
use crate::generation::options::{SamplingOptions, Settings};
use crate::generation::sampling::SamplerSpec;
use crate::kv_cache::CacheShape;

/// On the device, one row for each slot.
pub(super) struct Draws {
    pub(super) spec: SamplerSpec,
    pub(super) token: Array,
    pub(super) position: Array,
    /// Of the token drawn, ids of the most likely, and theirs; empty if they are not asked for.
    pub(super) log_probabilities: Vec<Array>,
    settings: Option<Array>,
    seed: Option<Array>,
    prompt_counts: Option<Array>,
    output_counts: Option<Array>,
    bias: Option<Array>,
}

impl Draws {
    /// Arguments for slots that draw as `rows` say. Slots that are `starting` begin with `prompts`; of the others, what
    /// `old` holds goes on.
    pub(super) fn start(
        engine: &Engine,
        cache: &CacheShape,
        prompts: &[Vec<u32>],
        rows: &[SamplingOptions],
        starting: &[bool],
        old: Option<Draws>,
        position: Array,
    ) -> Result<Draws, Error> {
        let (b, v) = (rows.len(), engine.model().vocab());
        let any = |f: fn(&SamplerSpec) -> bool| rows.iter().any(|s| f(&s.spec()));
        let spec = SamplerSpec {
            random: any(|s| s.random),
            typical: any(|s| s.typical),
            penalties: any(|s| s.penalties),
            bias: any(|s| s.bias),
            log_probabilities: rows.iter().filter_map(|s| s.log_probabilities).max(),
        };
        let greedy_in_batch = spec.random && rows.iter().any(|s| !s.spec().random);
        let settings = (spec.random || spec.penalties).then(|| {
            let rows = rows.iter().flat_map(|s| {
                let mut row = s.settings(engine.config().vocab_size);
                if greedy_in_batch && !s.spec().random {
                    row[Settings::TOP_K] = 1.0;
                }
                row
            });
            rows.collect::<Vec<f32>>()
        });
        let (mut prompt_counts, mut output_counts) = (None, None);
        if spec.penalties {
            let kept = |buffer: Option<&Array>| match buffer {
                Some(buffer) => buffer.to_vec::<i32>(),
                None => Ok(vec![0; b * v]),
            };
            let mut prompt = kept(old.as_ref().and_then(|old| old.prompt_counts.as_ref()))?;
            let mut output = kept(old.as_ref().and_then(|old| old.output_counts.as_ref()))?;
            for slot in (0..b).filter(|&slot| starting[slot]) {
                let counts = &mut prompt[slot * v..(slot + 1) * v];
                counts.fill(0);
                rows[slot].history.iter().chain(&prompts[slot]).for_each(|&id| counts[id as usize] += 1);
                output[slot * v..(slot + 1) * v].fill(0);
            }
            (prompt_counts, output_counts) = (Some(prompt), Some(output));
        }
        let bias = spec.bias.then(|| {
            let mut bias = vec![0f32; b * v];
            for (slot, s) in rows.iter().enumerate() {
                s.logit_bias.iter().for_each(|&(id, x)| bias[slot * v + id as usize] = x);
            }
            bias
        });
        let seeds: Vec<u64> = rows.iter().map(|s| s.seed).collect();
        let placement = engine.placement();
        let of_vocab = engine.model().sharding(cache, &["batch", "vocab"], &[b, v]);
        let settings = settings.map(|rows| placement.replicate(&rows, &[b, Settings::LEN])).transpose()?;
        let counts = |counts: Option<Vec<i32>>| {
            counts.map(|counts| placement.split(&counts, &[b, v], of_vocab.as_ref())).transpose()
        };
        let (token, kept) = match old {
            Some(old) => {
                (old.token, (old.spec.log_probabilities == spec.log_probabilities).then_some(old.log_probabilities))
            }
            None => (placement.replicate(&vec![0i32; b], &[b, 1])?, None),
        };
        let log_probabilities = match (kept, spec.log_probabilities) {
            (Some(kept), _) => kept,
            (None, None) => Vec::new(),
            (None, Some(n)) => vec![
                placement.replicate(&vec![0f32; b], &[b, 1])?,
                placement.replicate(&vec![0i32; b * n], &[b, n])?,
                placement.replicate(&vec![0f32; b * n], &[b, n])?,
            ],
        };
        Ok(Draws {
            spec,
            token,
            position,
            log_probabilities,
            settings,
            seed: spec.random.then(|| placement.replicate(&seeds, &[b])).transpose()?,
            output_counts: counts(output_counts)?,
            prompt_counts: counts(prompt_counts)?,
            bias: bias.map(|bias| placement.split(&bias, &[b, v], of_vocab.as_ref())).transpose()?,
        })
    }

    /// The sampler's arguments, in the order of its declaration.
    pub(super) fn sampler_args(&self) -> impl Iterator<Item = &Array> {
        [&self.settings, &self.seed, &self.prompt_counts, &self.output_counts, &self.bias].into_iter().flatten()
    }

    /// Takes what a step returned after the cache.
    pub(super) fn renew(&mut self, results: Vec<Array>) {
        let mut results = results.into_iter();
        let mut next = || results.next().expect("the step returns what its output says");
        self.token = next();
        self.position = next();
        self.log_probabilities.iter_mut().for_each(|kept| *kept = next());
        if let Some(counts) = &mut self.output_counts {
            *counts = next();
        }
    }

    /// Starts reading what was drawn; `wanted` says for each slot of how many ids the log-probabilities are asked for.
    pub(super) fn read(&self, wanted: Vec<Option<usize>>) -> Result<TokenRead, Error> {
        let log_probabilities = self.log_probabilities.iter().map(Array::read).collect::<Result<_, _>>()?;
        Ok(TokenRead { tokens: self.token.read()?, log_probabilities, wanted })
    }
}

/// Tokens on their way to the host.
pub struct TokenRead {
    tokens: HostRead,
    /// Of the token drawn, ids of the most likely, and theirs.
    log_probabilities: Vec<HostRead>,
    wanted: Vec<Option<usize>>,
}

/// What was drawn for one slot.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model (before temperature and cuts), if that was asked for.
    pub log_probability: Option<f32>,
    /// The most likely ids with theirs, falling.
    pub best: Vec<(u32, f32)>,
}

impl TokenRead {
    /// Waits for them: one for each slot.
    pub fn wait(self) -> Result<Vec<Drawn>, Error> {
        let words = |read: HostRead| -> Result<Vec<u32>, Error> {
            let bytes = read.wait()?;
            Ok(bytes.chunks_exact(4).map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]])).collect())
        };
        let ids = words(self.tokens)?;
        let mut drawn: Vec<Drawn> = ids
            .into_iter()
            .take(self.wanted.len())
            .map(|id| Drawn { id, log_probability: None, best: Vec::new() })
            .collect();
        let rest = self.log_probabilities.into_iter().map(words).collect::<Result<Vec<_>, _>>()?;
        if let [own, ids, values] = &rest[..] {
            let n = ids.len() / own.len();
            for (slot, drawn) in drawn.iter_mut().enumerate() {
                let Some(count) = self.wanted[slot] else { continue };
                drawn.log_probability = Some(f32::from_bits(own[slot]));
                let best = ids.iter().zip(values).skip(slot * n).take(count);
                drawn.best = best.map(|(&id, &value)| (id, f32::from_bits(value))).collect();
            }
        }
        Ok(drawn)
    }
}

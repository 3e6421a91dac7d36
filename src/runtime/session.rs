//! Sequences in progress: the cache of B slots, where each stands, and the steps that move them on.

use xla::DType;
use xla::pjrt::{Buffer, HostData, HostRead};

use super::engine::Engine;
use super::program::{Output, StepSpec};
use crate::Error;
use crate::generation::options::{SamplingOptions, Settings};
use crate::generation::sampling::SamplerSpec;
use crate::kv_cache::CacheShape;

/// The length of a cache with room for `len` positions: coarse steps, so that few programs serve many lengths.
pub fn cache_len(len: usize) -> usize {
    let step = if len <= 1024 { 256 } else { 1024 };
    len.max(1).next_multiple_of(step)
}

/// Tokens per run of prefill, largest first: whole chunks of the first, then the smallest that holds the rest.
pub const CHUNKS: [usize; 3] = [512, 128, 32];

/// Decode reads the cache up to a power of two from here on, so that a long cache costs only what is in it.
const READ_MIN: usize = 512;

/// B sequences that share programs and cache arrays.
pub struct Session<'e> {
    engine: &'e Engine,
    cache_shape: CacheShape,
    cache: Vec<Buffer>,
    /// Tokens that stand in each slot's cache.
    used: Vec<usize>,
    state: Option<State>,
}

/// What decode feeds back to itself, and the sampler's arguments.
struct State {
    spec: SamplerSpec,
    token: Buffer,
    position: Buffer,
    settings: Option<Buffer>,
    seed: Option<Buffer>,
    prompt_counts: Option<Buffer>,
    output_counts: Option<Buffer>,
    bias: Option<Buffer>,
}

impl State {
    fn sampler_args(&self) -> impl Iterator<Item = &Buffer> {
        [&self.settings, &self.seed, &self.prompt_counts, &self.output_counts, &self.bias].into_iter().flatten()
    }
}

impl<'e> Session<'e> {
    /// `batch` empty slots of at least `len` positions each.
    pub fn new(engine: &'e Engine, batch: usize, len: usize) -> Result<Session<'e>, Error> {
        let len = cache_len(len);
        let cache_shape = CacheShape { batch, len, dtype: engine.dtype() };
        let cache = engine.new_cache(cache_shape)?;
        Ok(Session { engine, cache_shape, cache, used: vec![0; batch], state: None })
    }

    /// The cache's shape.
    pub fn cache_shape(&self) -> CacheShape {
        self.cache_shape
    }

    /// Tokens in each slot.
    pub fn used(&self) -> &[usize] {
        &self.used
    }

    /// Forgets what comes after the first `len` tokens of slot `slot`.
    pub fn truncate(&mut self, slot: usize, len: usize) {
        self.used[slot] = self.used[slot].min(len);
        // What decode would feed itself belongs to the end that was cut off.
        self.state = None;
    }

    /// Appends `tokens` (one row of S ids for each slot) and returns the logits of all their positions, (B, S, V)
    /// row-major. Rows are run as one chunk of `padded` ≥ S tokens, so that a shorter last chunk needs no program.
    pub fn logits(&mut self, tokens: &[Vec<u32>], padded: usize) -> Result<Vec<f32>, Error> {
        let s = tokens.first().map_or(0, Vec::len);
        let outputs = self.run(tokens, padded, Output::Logits)?;
        let logits = outputs[0].1.to_vec::<f32>()?;
        let v = self.engine.config().vocab_size;
        Ok(logits.chunks(padded * v).flat_map(|slot| &slot[..s * v]).copied().collect())
    }

    /// As [`Session::logits`], with every named value of the model: `logits`, `layers.0/attention/q`, ….
    pub fn activations(&mut self, tokens: &[Vec<u32>]) -> Result<Vec<(String, Buffer)>, Error> {
        let s = tokens.first().map_or(0, Vec::len);
        self.run(tokens, s, Output::Activations)
    }

    /// The program's results after the cache, with their names.
    fn run(&mut self, tokens: &[Vec<u32>], padded: usize, output: Output) -> Result<Vec<(String, Buffer)>, Error> {
        let s = tokens.first().map_or(0, Vec::len);
        if s == 0 || tokens.len() != self.cache_shape.batch || tokens.iter().any(|row| row.len() != s) {
            let rows: Vec<usize> = tokens.iter().map(Vec::len).collect();
            let slots = self.cache_shape.batch;
            return Err(Error::Empty(format!("{slots} slots need rows of one length above 0, found lengths {rows:?}")));
        }
        self.state = None;
        let start = self.start();
        self.check_room("these tokens", start + padded)?;
        let spec = self.spec(padded, start + padded, output);
        let program = self.engine.program(&spec)?;
        let ids = self.upload_ids(tokens, padded)?;
        let position = self.upload_positions()?;
        let mut args: Vec<&Buffer> = self.engine.params().iter().chain(&self.cache).collect();
        args.extend([&ids, &position]);
        let mut outputs = program.executable.execute(&args)?;
        let rest = outputs.split_off(self.cache.len());
        self.cache = outputs;
        self.used.iter_mut().for_each(|u| *u += s);
        Ok(program.results[self.cache.len()..].iter().cloned().zip(rest).collect())
    }

    /// Appends each slot's prompt and draws the token that follows it. Prompts may differ in length; none is empty.
    /// `chunk` sets the tokens per run instead of [`CHUNKS`]; it is at least 2, because a run of one is the decode step.
    pub fn prefill(
        &mut self,
        prompts: &[Vec<u32>],
        sampling: &[SamplingOptions],
        chunk: Option<usize>,
    ) -> Result<(), Error> {
        self.start_sampling(prompts, sampling)?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let mut done = 0;
        while done < longest {
            let room = self.cache_shape.len - self.start().min(self.cache_shape.len);
            let size = chunk.map_or_else(|| next_chunk(longest - done, room), |chunk| chunk.max(2));
            self.prefill_chunk(prompts, done, size)?;
            done += size;
        }
        Ok(())
    }

    /// The programs that [`Session::prefill`] of prompts of `len` tokens and then decode will run.
    pub fn programs(&self, len: usize, spec: SamplerSpec) -> Vec<StepSpec> {
        let start = self.start();
        let mut specs = Vec::new();
        let mut done = 0;
        while done < len {
            let size = next_chunk(len - done, self.cache_shape.len - (start + done).min(self.cache_shape.len));
            specs.push(self.spec(size, start + done + size, Output::Token(spec)));
            done += size;
        }
        specs.push(self.spec(1, start + len + 1, Output::Token(spec)));
        specs.sort_unstable_by_key(|s| (s.tokens, s.read_len));
        specs.dedup();
        specs
    }

    fn prefill_chunk(&mut self, prompts: &[Vec<u32>], done: usize, size: usize) -> Result<(), Error> {
        let valid: Vec<usize> = prompts.iter().map(|p| p.len().saturating_sub(done).min(size)).collect();
        let end = self.used.iter().zip(&valid).filter(|(_, v)| **v > 0).map(|(u, _)| u + size).max().unwrap_or(size);
        self.check_room("the prompt", end)?;
        let rows: Vec<Vec<u32>> =
            prompts.iter().zip(&valid).map(|(p, v)| p[done.min(p.len())..][..*v].to_vec()).collect();
        let last: Vec<i32> =
            prompts.iter().zip(&valid).map(|(p, v)| i32::from(*v > 0 && p.len() <= done + size)).collect();
        let ids = self.upload_ids(&rows, size)?;
        let position = self.upload_positions()?;
        let valid_buffer = self.upload_i32(&valid.iter().map(|v| *v as i32).collect::<Vec<_>>())?;
        let last = self.upload_i32(&last)?;
        self.step(size, end, Some([ids, position, valid_buffer, last]))?;
        self.used.iter_mut().zip(&valid).for_each(|(u, v)| *u += v);
        Ok(())
    }

    /// Dispatches one decode step: the last drawn token goes in, the next is drawn. Nothing is waited for.
    pub fn decode(&mut self) -> Result<(), Error> {
        let end = self.used.iter().max().map_or(0, |u| u + 1);
        self.check_room("the next token", end)?;
        self.step(1, end, None)?;
        self.used.iter_mut().for_each(|u| *u += 1);
        Ok(())
    }

    /// Starts reading the tokens drawn last, one per slot.
    pub fn read_tokens(&self) -> Result<TokenRead, Error> {
        let state = self.state.as_ref().ok_or_else(|| Error::Empty("nothing was drawn yet".into()))?;
        Ok(TokenRead(state.token.to_host_async()?))
    }

    /// One run of a program that draws tokens. `prefill`: ids, position, valid, last.
    fn step(&mut self, tokens: usize, end: usize, prefill: Option<[Buffer; 4]>) -> Result<(), Error> {
        let state = self.state.as_ref().ok_or_else(|| Error::Empty("a prompt comes before decoding".into()))?;
        let spec = self.spec(tokens, end, Output::Token(state.spec));
        let program = self.engine.program(&spec)?;
        let mut args: Vec<&Buffer> = self.engine.params().iter().chain(&self.cache).collect();
        match &prefill {
            Some([ids, position, valid, last]) => args.extend([ids, position, valid, last, &state.token]),
            None => args.extend([&state.token, &state.position]),
        }
        args.extend(state.sampler_args());
        let mut outputs = program.executable.execute(&args)?;
        let mut rest = outputs.split_off(self.cache.len()).into_iter();
        self.cache = outputs;
        let state = self.state.as_mut().expect("checked above");
        state.token = rest.next().expect("the step returns a token");
        state.position = rest.next().expect("the step returns a position");
        if state.output_counts.is_some() {
            state.output_counts = rest.next();
        }
        Ok(())
    }

    /// Where the longest slot ends.
    fn start(&self) -> usize {
        self.used.iter().copied().max().unwrap_or(0)
    }

    fn spec(&self, tokens: usize, end: usize, output: Output) -> StepSpec {
        let CacheShape { batch, len, dtype } = self.cache_shape;
        let least = if tokens == 1 { READ_MIN } else { tokens };
        let read_len = end.max(least).next_power_of_two().min(len);
        StepSpec { batch, tokens, cache_len: len, read_len, cache_dtype: dtype, output }
    }

    fn check_room(&self, what: &str, end: usize) -> Result<(), Error> {
        match end <= self.cache_shape.len {
            true => Ok(()),
            false => Err(Error::Context {
                what: what.into(),
                needed: end,
                limit: self.cache_shape.len,
                reason: "the length of the cache".into(),
                advice: "raise --max-seq or shorten the prompt".into(),
            }),
        }
    }

    fn start_sampling(&mut self, prompts: &[Vec<u32>], sampling: &[SamplingOptions]) -> Result<(), Error> {
        let (b, v) = (self.cache_shape.batch, self.engine.config().vocab_size);
        if prompts.len() != b || sampling.len() != b {
            return Err(Error::Empty(format!("{b} slots, {} prompts and {} samplings", prompts.len(), sampling.len())));
        }
        for (slot, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() {
                return Err(Error::Empty(format!("the prompt of slot {slot} has no tokens")));
            }
        }
        sampling.iter().try_for_each(|s| s.validate(v))?;
        self.check_ids(prompts)?;
        sampling.iter().try_for_each(|s| self.check_ids(std::slice::from_ref(&s.history)))?;
        let any = |f: fn(&SamplerSpec) -> bool| sampling.iter().any(|s| f(&s.spec()));
        let spec = SamplerSpec { random: any(|s| s.random), penalties: any(|s| s.penalties), bias: any(|s| s.bias) };
        let greedy_in_batch = spec.random && sampling.iter().any(|s| !s.spec().random);

        let settings = (spec.random || spec.penalties).then(|| {
            let rows = sampling.iter().flat_map(|s| {
                let mut row = s.settings(v);
                if greedy_in_batch && !s.spec().random {
                    row[Settings::TOP_K] = 1.0;
                }
                row
            });
            rows.collect::<Vec<f32>>()
        });
        let counts = spec.penalties.then(|| {
            let mut counts = vec![0i32; b * v];
            for (slot, (prompt, s)) in prompts.iter().zip(sampling).enumerate() {
                s.history.iter().chain(prompt).for_each(|&id| counts[slot * v + id as usize] += 1);
            }
            counts
        });
        let bias = spec.bias.then(|| {
            let mut bias = vec![0f32; b * v];
            for (slot, s) in sampling.iter().enumerate() {
                s.logit_bias.iter().for_each(|&(id, x)| bias[slot * v + id as usize] = x);
            }
            bias
        });
        let seeds: Vec<u64> = sampling.iter().map(|s| s.seed).collect();
        let (client, device) = (self.engine.client(), Some(self.engine.device()));
        let f32s = |data: Option<Vec<f32>>, n: usize| {
            data.map(|d| client.upload_slice(&d, &[b, n], device)).transpose().map_err(Error::from)
        };
        self.state = Some(State {
            spec,
            token: client.upload_slice(&vec![0i32; b], &[b, 1], device)?,
            position: self.upload_positions()?,
            settings: f32s(settings, Settings::LEN)?,
            seed: spec.random.then(|| client.upload_slice(&seeds, &[b], device)).transpose()?,
            output_counts: counts
                .as_ref()
                .map(|c| client.upload_slice(&vec![0i32; c.len()], &[b, v], device))
                .transpose()?,
            prompt_counts: counts.map(|c| client.upload_slice(&c, &[b, v], device)).transpose()?,
            bias: f32s(bias, v)?,
        });
        Ok(())
    }

    fn check_ids(&self, rows: &[Vec<u32>]) -> Result<(), Error> {
        let vocab = self.engine.config().vocab_size;
        match rows.iter().flatten().find(|id| **id as usize >= vocab) {
            Some(id) => Err(Error::TokenId { id: i64::from(*id), vocab, place: "the prompt".into() }),
            None => Ok(()),
        }
    }

    /// (B, `padded`) i32, rows filled up with zeros.
    fn upload_ids(&self, rows: &[Vec<u32>], padded: usize) -> Result<Buffer, Error> {
        self.check_ids(rows)?;
        let mut ids = vec![0i32; rows.len() * padded];
        for (slot, row) in ids.chunks_mut(padded).zip(rows) {
            slot.iter_mut().zip(row).for_each(|(to, from)| *to = *from as i32);
        }
        let bytes: Vec<u8> = ids.iter().flat_map(|i| i.to_ne_bytes()).collect();
        let dims = [rows.len(), padded];
        Ok(self.engine.client().upload(HostData::Borrowed(&bytes), DType::I32, &dims, Some(self.engine.device()))?)
    }

    fn upload_positions(&self) -> Result<Buffer, Error> {
        self.upload_i32(&self.used.iter().map(|u| *u as i32).collect::<Vec<_>>())
    }

    fn upload_i32(&self, values: &[i32]) -> Result<Buffer, Error> {
        Ok(self.engine.client().upload_slice(values, &[values.len()], Some(self.engine.device()))?)
    }
}

/// The chunk for the next of `left` tokens where the cache has `room` positions. Several runs of a small chunk cost
/// less than one that is mostly padding.
fn next_chunk(left: usize, room: usize) -> usize {
    let [large, medium, small] = CHUNKS;
    if left > large - medium && room >= large {
        large
    } else if left > 2 * small && room >= medium {
        medium
    } else {
        small
    }
}

/// Logits (T, V) of `tokens` run in chunks of `chunk` through the cache; the last chunk is padded.
pub fn chunked_logits(engine: &Engine, tokens: &[u32], chunk: usize) -> Result<Vec<f32>, Error> {
    let mut session = Session::new(engine, 1, tokens.len().next_multiple_of(chunk))?;
    let mut logits = Vec::with_capacity(tokens.len() * engine.config().vocab_size);
    for part in tokens.chunks(chunk) {
        logits.extend(session.logits(&[part.to_vec()], chunk)?);
    }
    Ok(logits)
}

/// Tokens on their way to the host.
pub struct TokenRead(HostRead);

impl TokenRead {
    /// Waits for them: one id per slot.
    pub fn wait(self) -> Result<Vec<u32>, Error> {
        let bytes = self.0.wait()?;
        Ok(bytes.chunks_exact(4).map(|c| u32::from_ne_bytes([c[0], c[1], c[2], c[3]])).collect())
    }
}

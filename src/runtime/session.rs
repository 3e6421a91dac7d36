//! Sequences in progress: the cache of B slots, where each stands, and the steps that move them on.

use std::sync::Arc;

use super::draws::{Draws, TokenRead};
use super::engine::{Engine, Program};
use super::placement::Array;
use super::program::{CacheProgram, Output, StepSpec};
use crate::Error;
use crate::config;
use crate::generation::options::SamplingOptions;
use crate::generation::sampling::SamplerSpec;
use crate::kv_cache::{CacheShape, Layout, PageCopy, Pages, Slots};

/// The length of a cache with room for `len` positions: coarse steps, so that few programs serve many lengths.
pub fn cache_len(len: usize) -> usize {
    let step = if len <= 1024 { 256 } else { 1024 };
    len.max(1).next_multiple_of(step)
}

/// Tokens per run of prefill, largest first: whole chunks of the first, then the smallest that holds the rest.
pub const CHUNKS: [usize; 3] = [512, 128, 32];

/// B sequences that share programs and cache arrays. Each slot starts, grows and is freed by itself.
pub struct Session<'e> {
    engine: &'e Engine,
    /// Slots that are there for callers; a mesh may ask for more, which stay empty.
    batch: usize,
    shape: CacheShape,
    cache: Vec<Array>,
    slots: Slots,
    /// For each slot, the length that set its rotary frequencies.
    rope_len: Vec<usize>,
    /// For each rotary embedding that depends on the length, its frequencies (B, D/2).
    frequencies: Vec<Arc<Array>>,
    /// The table of pages as it was last sent to the device.
    table: Option<(Vec<i32>, Arc<Array>)>,
    /// How the slots that were started draw their tokens.
    sampling: Vec<Option<SamplingOptions>>,
    state: Option<Draws>,
}

/// The likeliest continuations of one slot.
#[derive(Clone, Debug, Default)]
pub struct Best {
    /// Ids, the likeliest first.
    pub ids: Vec<u32>,
    /// Their log-probabilities.
    pub log_probabilities: Vec<f32>,
    /// Hidden states of the tokens that were run, (n, M) row-major, if they were asked for.
    pub hidden: Vec<f32>,
}

impl<'e> Session<'e> {
    /// `batch` empty slots of at least `len` positions each, kept as the engine's [`CacheOptions`] say.
    ///
    /// [`CacheOptions`]: super::CacheOptions
    pub fn new(engine: &'e Engine, batch: usize, len: usize) -> Result<Session<'e>, Error> {
        let shape = engine.model().cache_shape(&engine.cache_options(), batch, cache_len(len));
        engine.model().mesh.check_cache(&shape)?;
        let cache = engine.execute(&*engine.cache_program(CacheProgram::New, shape)?, &[])?;
        let slots = Slots::new(&shape, &engine.config().windows());
        let mut session = Session {
            engine,
            batch,
            shape,
            cache,
            slots,
            rope_len: vec![0; shape.batch],
            frequencies: Vec::new(),
            table: None,
            sampling: vec![None; shape.batch],
            state: None,
        };
        session.upload_frequencies()?;
        Ok(session)
    }

    /// The cache's shape, without slots that only the mesh asks for.
    pub fn cache_shape(&self) -> CacheShape {
        CacheShape { batch: self.batch, ..self.shape }
    }

    /// The engine that runs it.
    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// Tokens in each slot.
    pub fn used(&self) -> Vec<usize> {
        let mut used = self.slots.all_used();
        used.truncate(self.batch);
        used
    }

    /// What stands in the slots.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// How many of the first `len` tokens of `slot` can stay where a text of `total` tokens in all is to be run: 0 where a
    /// sliding window has dropped what is needed, or the rotary frequencies of that length differ.
    pub fn keepable(&self, slot: usize, len: usize, total: usize) -> usize {
        let ropes = &self.engine.config().ropes;
        let same = |rope: &config::Rope| rope.length_class(self.rope_len[slot]) == rope.length_class(total);
        if ropes.iter().all(same) { self.slots.keepable(slot, len) } else { 0 }
    }

    /// Forgets what comes after the first `len` tokens of slot `slot`, and gives how many are kept: `len`, or 0 where a
    /// sliding window has dropped what would be needed.
    pub fn truncate(&mut self, slot: usize, len: usize) -> usize {
        // What decode would feed this slot belongs to the end that was cut off.
        self.sampling[slot] = None;
        if self.sampling.iter().all(Option::is_none) {
            self.state = None;
        }
        let kept = self.slots.truncate(slot, len);
        if kept == 0 {
            self.rope_len[slot] = 0;
        }
        kept
    }

    /// Empties `slot` for another text; the other slots go on.
    pub fn free(&mut self, slot: usize) {
        self.slots.free(slot);
        self.sampling[slot] = None;
        self.rope_len[slot] = 0;
    }

    /// Notes that `id` is what was drawn for `slot`, so that its text can be found by [`Session::reuse`].
    pub fn know(&mut self, slot: usize, id: u32) {
        let at = self.slots.known(slot);
        self.slots.know(slot, at, &[id]);
    }

    /// Gives `slot`, which is emptied, the longest beginning of `prompt` that some slot holds already, and returns its
    /// length; at least one token of the prompt is left to be run, by [`Session::start`] before anything else.
    pub fn reuse(&mut self, slot: usize, prompt: &[u32]) -> Result<usize, Error> {
        let found = self.slots.prefix(&prompt[..prompt.len().saturating_sub(1)], slot);
        let found = found.filter(|&(from, len)| self.keepable(from, len, prompt.len()) == len);
        let Some((from, len)) = found else {
            self.free(slot);
            return Ok(0);
        };
        if from != slot {
            let mut parents: Vec<usize> = (0..self.batch).collect();
            parents[slot] = from;
            self.reorder(&parents)?;
        }
        self.sampling[slot] = None;
        Ok(self.slots.truncate(slot, len))
    }

    /// Slot i becomes a copy of slot `parents[i]`, as beam search needs it. The tokens drawn last stay where they are: what comes
    /// next is a prompt or [`Session::best`], not [`Session::decode`].
    pub fn reorder(&mut self, parents: &[usize]) -> Result<(), Error> {
        let batch = self.batch;
        if parents.len() != batch || parents.iter().any(|&parent| parent >= batch) {
            return Err(Error::Empty(format!("{batch} slots cannot be copies of slots {parents:?}")));
        }
        if parents.iter().enumerate().all(|(i, &parent)| i == parent) {
            return Ok(());
        }
        let parents: Vec<usize> = parents.iter().copied().chain(batch..self.shape.batch).collect();
        self.slots.reorder(&parents);
        self.rope_len = parents.iter().map(|&parent| self.rope_len[parent]).collect();
        self.upload_frequencies()?;
        // Where all layers are paged, sharing the pages is all there is to do.
        let moved = |layer| !matches!(self.shape.layout(layer), Layout::Paged(_));
        if self.engine.config().layers.iter().any(moved) {
            let parents = self.upload_i32(&parents.iter().map(|&parent| parent as i32).collect::<Vec<_>>())?;
            self.run_cache_program(CacheProgram::Reorder, &[&parents])?;
        }
        Ok(())
    }

    fn run_cache_program(&mut self, program: CacheProgram, more: &[&Array]) -> Result<(), Error> {
        let program = self.engine.cache_program(program, self.shape)?;
        let args: Vec<&Array> = self.cache.iter().chain(more.iter().copied()).collect();
        self.cache = self.engine.execute(&program, &args)?;
        Ok(())
    }

    /// Appends `tokens` (one row of ids for each slot, not all empty) and returns the logits of all their positions, one row after
    /// another, (n, V) each. Rows are run as one chunk of `padded` ≥ S tokens, so that a shorter last chunk needs no program.
    pub fn logits(&mut self, tokens: &[Vec<u32>], padded: usize) -> Result<Vec<f32>, Error> {
        let outputs = self.run(tokens, padded, Output::Logits)?;
        let logits = outputs[0].1.to_vec::<f32>()?;
        let (v, on_mesh) = (self.engine.config().vocab_size, self.engine.model().vocab());
        let rows = logits.chunks(padded * on_mesh).zip(tokens);
        let rows = rows.flat_map(|(slot, row)| slot[..row.len() * on_mesh].chunks(on_mesh));
        Ok(rows.flat_map(|row| &row[..v]).copied().collect())
    }

    /// As [`Session::logits`], with every named value of the model: `logits`, `layers.0/attention/q`, ….
    pub fn activations(&mut self, tokens: &[Vec<u32>]) -> Result<Vec<(String, Array)>, Error> {
        let s = tokens.first().map_or(0, Vec::len);
        self.run(tokens, s, Output::Activations)
    }

    /// Appends `tokens` (one row of ids for each slot) and returns the likeliest ids after each.
    pub fn best(&mut self, tokens: &[Vec<u32>], count: usize, hidden: bool) -> Result<Vec<Best>, Error> {
        let all = self.on_mesh(tokens);
        self.check_whole(&all)?;
        self.set_rope_len(&all)?;
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let m = self.engine.config().d_model;
        let mut found = vec![Best::default(); tokens.len()];
        let mut done = 0;
        while done < longest {
            let room = self.shape.len - self.furthest().min(self.shape.len);
            let size = if longest == 1 { 1 } else { next_chunk(longest - done, room) };
            let rows = part(tokens, done, size);
            let outputs = self.run(&rows, size, Output::Best { count, hidden })?;
            let ids = outputs[0].1.to_vec::<i32>()?;
            let log_probabilities = outputs[1].1.to_vec::<f32>()?;
            let states = if hidden { outputs[2].1.to_vec::<f32>()? } else { Vec::new() };
            for (slot, row) in rows.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
                found[slot].ids = ids[slot * count..][..count].iter().map(|&id| id as u32).collect();
                found[slot].log_probabilities = log_probabilities[slot * count..][..count].to_vec();
                if hidden {
                    found[slot].hidden.extend(&states[slot * size * m..][..row.len() * m]);
                }
            }
            done += size;
        }
        Ok(found)
    }

    /// The program's results after the cache, with their names.
    fn run(&mut self, tokens: &[Vec<u32>], padded: usize, output: Output) -> Result<Vec<(String, Array)>, Error> {
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        if longest == 0 || longest > padded || tokens.len() != self.batch {
            let rows: Vec<usize> = tokens.iter().map(Vec::len).collect();
            let slots = self.batch;
            return Err(Error::Empty(format!(
                "{slots} slots need a row each of at most {padded} ids, not all empty; found lengths {rows:?}"
            )));
        }
        self.state = None;
        let tokens = &self.on_mesh(tokens);
        self.set_rope_len(tokens)?;
        let (args, end) = self.step_args(tokens, padded)?;
        let program = self.engine.program(&self.spec(padded, end, output))?;
        let rest = self.execute(&program, &args.iter().map(Arc::as_ref).collect::<Vec<_>>())?;
        self.appended(tokens);
        Ok(program.results[self.cache.len()..].iter().cloned().zip(rest).collect())
    }

    /// Runs a program over parameters, cache and `args`; the cache is renewed, the other results are returned.
    fn execute(&mut self, program: &Program, args: &[&Array]) -> Result<Vec<Array>, Error> {
        let all: Vec<&Array> = self.engine.params().iter().chain(&self.cache).chain(args.iter().copied()).collect();
        let mut outputs = self.engine.execute(program, &all)?;
        let rest = outputs.split_off(self.cache.len());
        self.cache = outputs;
        Ok(rest)
    }

    /// Notes that a step has put `rows` into the cache.
    fn appended(&mut self, rows: &[Vec<u32>]) {
        for (slot, row) in rows.iter().enumerate() {
            let at = self.slots.used(slot);
            self.slots.advance(slot, row.len());
            self.slots.know(slot, at, row);
        }
    }

    /// Tokens, positions, table, frequencies, and how many tokens count: the arguments after the cache of a step over
    /// `size` tokens per slot; and the position where the furthest slot ends.
    fn step_args(&mut self, rows: &[Vec<u32>], size: usize) -> Result<(Vec<Arc<Array>>, usize), Error> {
        let end = self.furthest_of(rows) + size;
        self.check_room("these tokens", end)?;
        let ends = self.ends(rows);
        let mut args = vec![Arc::new(self.upload_ids(rows, size)?), Arc::new(self.upload_positions()?)];
        args.extend(self.reserve(&ends)?);
        args.extend(self.frequencies.iter().cloned());
        args.push(Arc::new(self.upload_i32(&rows.iter().map(|row| row.len() as i32).collect::<Vec<_>>())?));
        Ok((args, end))
    }

    /// Makes room for the first `lens` positions of each slot and returns the table of pages, if there is one.
    fn reserve(&mut self, lens: &[usize]) -> Result<Option<Arc<Array>>, Error> {
        let copies = self.slots.reserve(lens)?;
        let Some(table) = self.slots.table() else { return Ok(None) };
        let Pages { count, .. } = self.shape.pages.expect("a table comes with pages");
        for some in copies.chunks(self.shape.batch) {
            let column = |f: fn(&PageCopy) -> u32, fill: usize| {
                let mut column: Vec<i32> = some.iter().map(|copy| f(copy) as i32).collect();
                column.resize(self.shape.batch, fill as i32);
                self.upload_i32(&column)
            };
            let (from, to) = (column(|copy| copy.from, 0)?, column(|copy| copy.to, count)?);
            self.run_cache_program(CacheProgram::CopyPages { count: self.shape.batch }, &[&from, &to])?;
        }
        // Most steps stay within the pages that their slots have.
        if let Some((known, buffer)) = &self.table
            && *known == table
        {
            return Ok(Some(buffer.clone()));
        }
        let dims = [self.shape.batch, self.shape.table_len()];
        let buffer = Arc::new(self.engine.placement().replicate(&table, &dims)?);
        self.table = Some((table, buffer.clone()));
        Ok(Some(buffer))
    }

    /// Sets the frequencies of slots that `tokens` begins.
    fn set_rope_len(&mut self, tokens: &[Vec<u32>]) -> Result<(), Error> {
        let mut changed = false;
        for (slot, row) in tokens.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
            if self.slots.used(slot) == 0 {
                changed |= self.rope_len[slot] < row.len();
                self.rope_len[slot] = self.rope_len[slot].max(row.len());
            }
        }
        if changed { self.upload_frequencies() } else { Ok(()) }
    }

    /// Sets the length that the frequencies of `slot` are for, before its first tokens are run in parts.
    pub fn set_length(&mut self, slot: usize, len: usize) -> Result<(), Error> {
        self.rope_len[slot] = len;
        self.upload_frequencies()
    }

    fn upload_frequencies(&mut self) -> Result<(), Error> {
        let ropes = self.engine.config().ropes.iter().filter(|rope| rope.depends_on_length());
        let upload = |rope: &config::Rope| {
            let rows: Vec<f32> = self.rope_len.iter().flat_map(|&len| rope.inv_freq(len)).collect();
            let dims = [self.shape.batch, rope.dim / 2];
            self.engine.placement().replicate(&rows, &dims).map(Arc::new)
        };
        self.frequencies = ropes.map(upload).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Appends each slot's prompt and draws the token that follows it. Prompts may differ in length; none is empty.
    /// `chunk` sets the tokens per run instead of [`CHUNKS`]; it is at least 2, because a run of one is the decode step.
    pub fn prefill(
        &mut self,
        prompts: &[Vec<u32>],
        sampling: &[SamplingOptions],
        chunk: Option<usize>,
    ) -> Result<(), Error> {
        if prompts.len() != self.batch || sampling.len() != prompts.len() {
            let (b, p, s) = (self.batch, prompts.len(), sampling.len());
            return Err(Error::Empty(format!("{b} slots, {p} prompts and {s} samplings")));
        }
        if let Some(slot) = prompts.iter().position(Vec::is_empty) {
            return Err(Error::Empty(format!("the prompt of slot {slot} has no tokens")));
        }
        self.state = None;
        let sampling: Vec<_> = sampling.iter().cloned().map(Some).collect();
        self.append(&self.on_mesh(prompts), self.on_mesh(&sampling), chunk)
    }

    /// Appends `prompt` to one slot and draws the token that follows it, while the others stand still: their last tokens
    /// are kept, and [`Session::decode`] moves all slots on together.
    pub fn start(&mut self, slot: usize, prompt: &[u32], sampling: &SamplingOptions) -> Result<(), Error> {
        if prompt.is_empty() {
            return Err(Error::Empty(format!("the prompt of slot {slot} has no tokens")));
        }
        let mut prompts = vec![Vec::new(); self.shape.batch];
        prompts[slot] = prompt.to_vec();
        let mut all = vec![None; self.shape.batch];
        all[slot] = Some(sampling.clone());
        self.append(&prompts, all, None)
    }

    /// Appends the prompts that are not empty.
    fn append(
        &mut self,
        prompts: &[Vec<u32>],
        sampling: Vec<Option<SamplingOptions>>,
        chunk: Option<usize>,
    ) -> Result<(), Error> {
        self.check_ids(prompts)?;
        self.check_whole(prompts)?;
        self.start_sampling(prompts, sampling)?;
        self.set_rope_len(prompts)?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let mut done = 0;
        while done < longest {
            let start = self.furthest_of(prompts);
            let size = chunk.map_or_else(|| self.chunk(start, longest - done), |chunk| chunk.max(2));
            self.prefill_chunk(prompts, done, size)?;
            done += size;
        }
        Ok(())
    }

    /// What is said of each slot, with nothing for those that only the mesh asks for.
    fn on_mesh<T: Clone + Default>(&self, slots: &[T]) -> Vec<T> {
        let mut all = slots.to_vec();
        all.resize(self.shape.batch, T::default());
        all
    }

    /// Where each slot ends after `rows`; 0 for those that get nothing.
    fn ends(&self, rows: &[Vec<u32>]) -> Vec<usize> {
        let end = |(used, row): (usize, &Vec<u32>)| if row.is_empty() { 0 } else { used + row.len() };
        self.slots.all_used().into_iter().zip(rows).map(end).collect()
    }

    /// Refuses rows that do not fit before any of their chunks is run.
    fn check_whole(&self, rows: &[Vec<u32>]) -> Result<(), Error> {
        let ends = self.ends(rows);
        self.check_room("the prompt", ends.iter().copied().max().unwrap_or(0))?;
        self.slots.clone().reserve(&ends).map(drop)
    }

    /// Tokens of the next run of a prefill that has got to position `start` and has `left` tokens to go.
    fn chunk(&self, start: usize, left: usize) -> usize {
        let adopted = if start == 0 { self.engine.adopted_prefill(self.shape, left) } else { None };
        adopted.unwrap_or_else(|| next_chunk(left, self.shape.len - start.min(self.shape.len)))
    }

    /// The programs that [`Session::prefill`] of prompts of `len` tokens and then decode will run.
    pub fn programs(&self, len: usize, spec: SamplerSpec) -> Vec<StepSpec> {
        let start = self.furthest();
        let mut specs = Vec::new();
        let mut done = 0;
        while done < len {
            let size = self.chunk(start + done, len - done);
            specs.push(self.spec(size, start + done + size, Output::Token(spec)));
            done += size;
        }
        specs.push(self.spec(1, start + len + 1, Output::Token(spec)));
        specs.sort_unstable_by_key(|s| (s.tokens, s.read_len));
        specs.dedup();
        specs
    }

    fn prefill_chunk(&mut self, prompts: &[Vec<u32>], done: usize, size: usize) -> Result<(), Error> {
        let rows = part(prompts, done, size);
        let ends_here = |(p, row): (&Vec<u32>, &Vec<u32>)| i32::from(!row.is_empty() && p.len() <= done + size);
        let last: Vec<i32> = prompts.iter().zip(&rows).map(ends_here).collect();
        let (mut args, end) = self.step_args(&rows, size)?;
        args.push(Arc::new(self.upload_i32(&last)?));
        self.step(size, end, args)?;
        self.appended(&rows);
        Ok(())
    }

    /// Dispatches one decode step: the last drawn token goes in, the next is drawn. Nothing is waited for. Slots that
    /// were never started, or are freed, run along without effect on the others.
    pub fn decode(&mut self) -> Result<(), Error> {
        let active: Vec<bool> = self.sampling.iter().map(Option::is_some).collect();
        let ends: Vec<usize> = self
            .slots
            .all_used()
            .iter()
            .zip(&active)
            .map(|(used, active)| if *active { used + 1 } else { 0 })
            .collect();
        let end = ends.iter().copied().max().unwrap_or(0).max(1);
        self.check_room("the next token", end)?;
        let mut args: Vec<Arc<Array>> = self.reserve(&ends)?.into_iter().collect();
        args.extend(self.frequencies.iter().cloned());
        self.step(1, end, args)?;
        (0..self.shape.batch).filter(|&slot| active[slot]).for_each(|slot| self.slots.advance(slot, 1));
        Ok(())
    }

    /// Starts reading the tokens drawn last, one per slot.
    pub fn read_tokens(&self) -> Result<TokenRead, Error> {
        let state = self.state.as_ref().ok_or_else(|| Error::Empty("nothing was drawn yet".into()))?;
        let wanted =
            self.sampling.iter().take(self.batch).map(|row| row.as_ref().and_then(|row| row.log_probabilities));
        state.read(wanted.collect())
    }

    /// One run of a program that draws tokens. `given`: of prefill all arguments from ids to `last`, of decode those after
    /// the position, which it has itself.
    fn step(&mut self, tokens: usize, end: usize, given: Vec<Arc<Array>>) -> Result<(), Error> {
        let mut state = self.state.take().ok_or_else(|| Error::Empty("a prompt comes before decoding".into()))?;
        let spec = self.spec(tokens, end, Output::Token(state.spec));
        let program = self.engine.program(&spec)?;
        let given = given.iter().map(Arc::as_ref);
        let mut args: Vec<&Array> = match spec.is_decode() {
            true => [&state.token, &state.position].into_iter().chain(given).collect(),
            false => given.chain([&state.token]).chain(&state.log_probabilities).collect(),
        };
        args.extend(state.sampler_args());
        let rest = self.execute(&program, &args)?;
        state.renew(rest);
        self.state = Some(state);
        Ok(())
    }

    /// Where the longest slot ends.
    fn furthest(&self) -> usize {
        self.slots.all_used().into_iter().max().unwrap_or(0)
    }

    /// Where the longest slot ends that has a prompt.
    fn furthest_of(&self, prompts: &[Vec<u32>]) -> usize {
        self.slots.all_used().into_iter().zip(prompts).filter(|(_, p)| !p.is_empty()).map(|(u, _)| u).max().unwrap_or(0)
    }

    fn spec(&self, tokens: usize, end: usize, output: Output) -> StepSpec {
        let read_len = self.engine.model().read_len(&self.shape, tokens, end);
        self.engine.covering(StepSpec { tokens, cache: self.shape, read_len, output })
    }

    fn check_room(&self, what: &str, end: usize) -> Result<(), Error> {
        match end <= self.shape.len {
            true => Ok(()),
            false => Err(Error::Context {
                what: what.into(),
                needed: end,
                limit: self.shape.len,
                reason: "the length of the cache".into(),
                advice: "raise --max-seq or shorten the prompt".into(),
            }),
        }
    }

    /// Makes the sampler's arguments for the slots of `sampling` that are given, beside those that were started before.
    fn start_sampling(&mut self, prompts: &[Vec<u32>], sampling: Vec<Option<SamplingOptions>>) -> Result<(), Error> {
        for options in sampling.iter().flatten() {
            options.validate(self.engine.config().vocab_size)?;
            self.check_ids(std::slice::from_ref(&options.history))?;
        }
        // What the other slots drew goes on.
        let old = self.state.take();
        let starting: Vec<bool> = sampling.iter().map(Option::is_some).collect();
        let kept = self.sampling.iter_mut().map(|kept| if old.is_some() { kept.take() } else { None });
        self.sampling = sampling.into_iter().zip(kept).map(|(new, kept)| new.or(kept)).collect();
        let rows: Vec<SamplingOptions> = self.sampling.iter().map(|row| row.clone().unwrap_or_default()).collect();
        self.state =
            Some(Draws::start(self.engine, &self.shape, prompts, &rows, &starting, old, self.upload_positions()?)?);
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
    fn upload_ids(&self, rows: &[Vec<u32>], padded: usize) -> Result<Array, Error> {
        self.check_ids(rows)?;
        let mut ids = vec![0i32; rows.len() * padded];
        for (slot, row) in ids.chunks_mut(padded).zip(rows) {
            slot.iter_mut().zip(row).for_each(|(to, from)| *to = *from as i32);
        }
        self.engine.placement().replicate(&ids, &[rows.len(), padded])
    }

    fn upload_positions(&self) -> Result<Array, Error> {
        self.upload_i32(&self.slots.all_used().iter().map(|u| *u as i32).collect::<Vec<_>>())
    }

    fn upload_i32(&self, values: &[i32]) -> Result<Array, Error> {
        self.engine.placement().replicate(values, &[values.len()])
    }
}

/// Tokens `done` … `done + size − 1` of each row, as far as it goes.
fn part(rows: &[Vec<u32>], done: usize, size: usize) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row[done.min(row.len())..row.len().min(done + size)].to_vec()).collect()
}

/// The chunk for the next of `left` tokens where the cache has `room` positions. Several runs of a small chunk cost
/// less than one that is mostly padding. It is at least 2: a run of one is the decode step.
fn next_chunk(left: usize, room: usize) -> usize {
    let [large, medium, small] = CHUNKS;
    if left > large - medium && room >= large {
        large
    } else if left > 2 * small && room >= medium {
        medium
    } else {
        small.min(room).max(2)
    }
}

/// Logits (T, V) of `tokens` run in chunks of `chunk` through the cache; the last chunk is padded.
pub fn chunked_logits(engine: &Engine, tokens: &[u32], chunk: usize) -> Result<Vec<f32>, Error> {
    let mut session = Session::new(engine, 1, tokens.len().next_multiple_of(chunk))?;
    let mut logits = Vec::with_capacity(tokens.len() * engine.config().vocab_size);
    for part in tokens.chunks(chunk) {
        // All chunks turn with the frequencies of the whole text.
        if session.used() == [0] {
            session.set_length(0, tokens.len())?;
        }
        logits.extend(session.logits(&[part.to_vec()], chunk)?);
    }
    Ok(logits)
}

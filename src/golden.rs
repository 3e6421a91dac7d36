//! Goldens: what PyTorch computed, and how far we are from it. `golden/README.md` has the format.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use converter::{Checkpoint, Precision};
use npyz::npz::NpzArchive;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xla::DType;

use crate::Error;
use crate::generation::SamplingOptions;
use crate::runtime::{Engine, Session, chunked_logits, hex};
use crate::sharding::MeshShape;
use crate::text::Tokenizer;

/// What `manifest.json` says of itself.
#[derive(Deserialize)]
struct Form {
    format: String,
    version: u32,
}

/// `manifest.json`.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    tolerances: Tolerances,
    /// The cases, sorted by name.
    pub cases: Vec<Case>,
}

/// How far we may be from PyTorch.
#[derive(Clone, Debug, Deserialize)]
struct Tolerances {
    f32_kl_max: f64,
    activation_relative: f64,
    consistency_absolute: f64,
    /// By type: how many times PyTorch's own figures.
    kl_factor: BTreeMap<String, KlFigures>,
}

/// One model and one run of PyTorch over it.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Its name in the table.
    pub name: String,
    model: ModelRef,
    npz: PathBuf,
    vocab_size: usize,
    logits: LogitsKind,
    text: Option<String>,
    greedy: Vec<Greedy>,
    /// By type: how far PyTorch's own run is.
    pytorch: BTreeMap<String, KlFigures>,
    files: BTreeMap<PathBuf, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ModelRef {
    Path(PathBuf),
    Model(String),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum LogitsKind {
    Full,
    Top { k: usize },
}

#[derive(Debug, Deserialize)]
struct Greedy {
    text: Option<String>,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct KlFigures {
    kl_mean: f64,
    kl_max: f64,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case.
    pub case: String,
    /// What was compared.
    pub check: String,
    /// Largest absolute difference (of logits; of activations, relative to the array's largest value).
    pub max_abs_error: Option<f64>,
    /// Mean KL divergence of a position, nats.
    pub mean_kl: Option<f64>,
    /// Largest KL divergence of one position, nats.
    pub max_kl: Option<f64>,
    /// Share of positions (or tokens) where the most likely id is the same.
    pub top1: Option<f64>,
    /// The bar, in words.
    pub tolerance: String,
    /// Whether it was met.
    pub pass: bool,
    /// The mesh does not divide this model, so there is nothing to compare.
    pub refused: bool,
    /// What went wrong, if the comparison could not be made.
    pub note: Option<String>,
}

impl Row {
    /// The row of a case that could not be compared at all.
    pub fn failed(case: &Case, why: &dyn std::fmt::Display) -> Row {
        Row { note: Some(why.to_string()), ..Row::new(&case.name, "all") }
    }

    /// The row of a case whose model a mesh does not divide.
    pub fn refused(case: &Case, why: &dyn std::fmt::Display) -> Row {
        Row { pass: true, refused: true, ..Row::failed(case, why) }
    }

    fn new(case: &str, check: &str) -> Row {
        Row {
            case: case.into(),
            check: check.into(),
            max_abs_error: None,
            mean_kl: None,
            max_kl: None,
            top1: None,
            tolerance: String::new(),
            pass: false,
            refused: false,
            note: None,
        }
    }
}

impl Manifest {
    /// Reads `DIR/manifest.json`.
    pub fn open(dir: &Path) -> Result<Manifest, Error> {
        let path = dir.join("manifest.json");
        let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
        let bad = |what: String| Error::Golden { path: path.clone(), what };
        let Form { format, version } = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if format != "xllama-golden" || version != 3 {
            return Err(bad(format!(
                "expected format xllama-golden version 3, found {format} version {version}; make it again with scripts/make_golden.py"
            )));
        }
        serde_json::from_str(&text).map_err(|e| bad(e.to_string()))
    }
}

impl Case {
    /// The `--model` that the case wants: a folder in `dir`, or a name (`replacement` instead of it, if given).
    pub fn model(&self, dir: &Path, replacement: Option<&str>) -> String {
        match (&self.model, replacement) {
            (ModelRef::Path(path), _) => dir.join(path).display().to_string(),
            (ModelRef::Model(_), Some(model)) => model.to_string(),
            (ModelRef::Model(model), None) => model.clone(),
        }
    }

    fn verify_files(&self, dir: &Path) -> Result<(), Error> {
        for (file, expected) in &self.files {
            let path = dir.join(file);
            let bytes = fs::read(&path).map_err(Error::io("reading", &path))?;
            let found = hex(&Sha256::digest(&bytes));
            if found != *expected {
                let what = format!("expected sha256 {expected} from the manifest, found {found}");
                return Err(Error::Golden { path, what });
            }
        }
        Ok(())
    }
}

/// The arrays of a `golden.npz`.
struct Arrays {
    path: PathBuf,
    npz: NpzArchive<BufReader<File>>,
}

impl Arrays {
    fn open(path: PathBuf) -> Result<Arrays, Error> {
        let npz = NpzArchive::open(&path).map_err(Error::io("reading", &path))?;
        Ok(Arrays { path, npz })
    }

    fn read<T: npyz::Deserialize>(&mut self, name: &str) -> Result<Vec<T>, Error> {
        self.find(name)?
            .ok_or_else(|| Error::Golden { path: self.path.clone(), what: format!("array {name} is missing") })
    }

    fn find<T: npyz::Deserialize>(&mut self, name: &str) -> Result<Option<Vec<T>>, Error> {
        let wrong = |what: String| Error::Golden { path: self.path.clone(), what: format!("array {name}: {what}") };
        match self.npz.by_name(name) {
            Ok(Some(array)) => array.into_vec().map(Some).map_err(|e| wrong(e.to_string())),
            Ok(None) => Ok(None),
            Err(e) => Err(wrong(e.to_string())),
        }
    }
}

/// The reference distribution of each position.
enum Reference {
    Full { logits: Vec<f32>, vocab: usize },
    Top { ids: Vec<i32>, logits: Vec<f32>, rest_lse: Vec<f64>, k: usize, vocab: usize },
}

/// How far logits are from the reference.
struct Distance {
    max_abs: f64,
    kl_max: f64,
    kl_mean: f64,
    top1: f64,
}

impl Reference {
    fn read(case: &Case, arrays: &mut Arrays, positions: usize) -> Result<Reference, Error> {
        let vocab = case.vocab_size;
        let reference = match case.logits {
            LogitsKind::Full => Reference::Full { logits: arrays.read("logits")?, vocab },
            LogitsKind::Top { k } => Reference::Top {
                ids: arrays.read("top_ids")?,
                logits: arrays.read("top_logits")?,
                rest_lse: arrays.read("rest_lse")?,
                k,
                vocab,
            },
        };
        let consistent = match &reference {
            Reference::Full { logits, .. } => logits.len() == positions * vocab,
            Reference::Top { ids, logits, rest_lse, k, .. } => {
                ids.len() == positions * k
                    && logits.len() == positions * k
                    && rest_lse.len() == positions
                    && ids.iter().all(|&i| usize::try_from(i).is_ok_and(|i| i < vocab))
            }
        };
        match consistent {
            true => Ok(reference),
            false => Err(Error::Golden {
                path: arrays.path.clone(),
                what: format!("the logits do not fit {positions} positions and a vocabulary of {vocab}"),
            }),
        }
    }

    /// KL(reference ‖ ours) in nats per position, in f64. With top-k storage over k + 1 classes: the k ids and the rest.
    fn distance(&self, ours: &[f32]) -> Distance {
        let vocab = match self {
            Reference::Full { vocab, .. } | Reference::Top { vocab, .. } => *vocab,
        };
        let rows = ours.chunks_exact(vocab);
        let n = rows.len() as f64;
        let (mut max_abs, mut kl_max, mut kl_sum, mut same) = (0f64, 0f64, 0f64, 0f64);
        for (t, row) in rows.enumerate() {
            let (kl, abs, top) = match self {
                Reference::Full { logits, .. } => full_row(&logits[t * vocab..][..vocab], row),
                Reference::Top { ids, logits, rest_lse, k, .. } => {
                    top_row(&ids[t * k..][..*k], &logits[t * k..][..*k], rest_lse[t], row)
                }
            };
            // A NaN must not pass as "not larger".
            let kl = if kl.is_nan() { f64::INFINITY } else { kl.max(0.0) };
            let abs = if abs.is_nan() { f64::INFINITY } else { abs };
            (max_abs, kl_max, kl_sum) = (max_abs.max(abs), kl_max.max(kl), kl_sum + kl);
            same += f64::from(u8::from(top));
        }
        Distance { max_abs, kl_max, kl_mean: kl_sum / n, top1: same / n }
    }
}

fn full_row(reference: &[f32], ours: &[f32]) -> (f64, f64, bool) {
    let (lse_r, lse_o) = (log_sum_exp(reference.iter()), log_sum_exp(ours.iter()));
    let kl = reference.iter().zip(ours).map(|(&r, &o)| {
        let (p, q) = (f64::from(r) - lse_r, f64::from(o) - lse_o);
        p.exp() * (p - q)
    });
    (kl.sum(), max_difference(reference.iter().zip(ours)), argmax(reference) == argmax(ours))
}

fn top_row(ids: &[i32], logits: &[f32], rest_lse: f64, ours: &[f32]) -> (f64, f64, bool) {
    let top = log_sum_exp(logits.iter());
    let high = top.max(rest_lse);
    let lse = high + ((top - high).exp() + (rest_lse - high).exp()).ln();
    let lse_o = log_sum_exp(ours.iter());
    let picked: Vec<f32> = ids.iter().map(|&i| ours[i as usize]).collect();
    let mut rest = ours.to_vec();
    ids.iter().for_each(|&i| rest[i as usize] = f32::NEG_INFINITY);
    let term = |p: f64, q: f64| if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) };
    let top: f64 = logits.iter().zip(&picked).map(|(&r, &o)| term(f64::from(r) - lse, f64::from(o) - lse_o)).sum();
    let kl = top + term(rest_lse - lse, log_sum_exp(rest.iter()) - lse_o);
    (kl, max_difference(logits.iter().zip(&picked)), ids.first().map(|i| *i as usize) == Some(argmax(ours)))
}

/// ln Σ exp(x) in f64; −∞ of nothing.
pub(crate) fn log_sum_exp<'a>(values: impl Iterator<Item = &'a f32> + Clone) -> f64 {
    let max = values.clone().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let max = f64::from(max);
    max + values.map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

fn max_difference<'a>(pairs: impl Iterator<Item = (&'a f32, &'a f32)>) -> f64 {
    pairs.fold(0f64, |m, (a, b)| {
        let d = (f64::from(*a) - f64::from(*b)).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    })
}

fn argmax(row: &[f32]) -> usize {
    let best = row.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, &x)| if x > b.1 { (i, x) } else { b });
    best.0
}

/// What an int8 cache with a scale for each position and head may cost, nats. Measured: at most 1.3e-3 and 1.1e-2 on the small
/// models, 4.2e-3 at most for SmolLM2 (heads of 64), 3.3e-3 and 2.3e-2 for Gemma 3 270M (one head of 256).
const INT8_CACHE: KlFigures = KlFigures { kl_mean: 5e-3, kl_max: 3e-2 };

/// How far logits on a mesh may be from those of one device, f32.
const MESH_ABSOLUTE: f64 = 1e-4;

/// What a run in fewer bits is held to: the same of PyTorch.
const NARROW: [&str; 4] = ["bf16", "f16", "int8", "int4"];

/// Makes an engine of a checkpoint in a type on a mesh.
pub type Load<'a> = dyn Fn(&Checkpoint, Precision, MeshShape) -> Result<Engine, Error> + 'a;

/// Runs one case on `mesh` with the engines that `load` makes. On several devices the logits are compared with one device's
/// too, and activations, which then lie in pieces, are not.
///
/// # Errors
/// Files that are damaged or belong to another model; whatever the engine refuses.
pub fn check(
    case: &Case,
    dir: &Path,
    tolerances_of: &Manifest,
    checkpoint: &Checkpoint,
    mesh: MeshShape,
    load: &Load<'_>,
) -> Result<Vec<Row>, Error> {
    if let Err(why) = mesh.check(checkpoint.config()) {
        return Ok(vec![Row::refused(case, &why)]);
    }
    case.verify_files(dir)?;
    let tolerances = &tolerances_of.tolerances;
    let mut arrays = Arrays::open(dir.join(&case.npz))?;
    let tokens: Vec<u32> = arrays.read::<i32>("tokens")?.into_iter().map(|t| t as u32).collect();
    let vocab = checkpoint.config().vocab_size;
    let unfit = match tokens.iter().find(|&&id| id as usize >= vocab) {
        _ if vocab != case.vocab_size => {
            Some(format!("a vocabulary of {}, the model's has {vocab} ids", case.vocab_size))
        }
        _ if tokens.is_empty() => Some("no tokens".into()),
        Some(id) => Some(format!("token {id}, the model's vocabulary ends at {}", vocab - 1)),
        None => None,
    };
    if let Some(what) = unfit {
        let what = format!("the golden has {what}; is it of another model?");
        return Err(Error::Golden { path: dir.join(&case.npz), what });
    }
    let reference = Reference::read(case, &mut arrays, tokens.len())?;
    let row = |check: &str| Row::new(&case.name, check);
    let mut rows = Vec::new();

    let f32 = Precision::Float(converter::DType::F32);
    let engine = load(checkpoint, f32, mesh)?;
    let within = |name: &str, logits: &[f32], (bar, tolerance): (KlFigures, String)| {
        let d = reference.distance(logits);
        Row {
            max_abs_error: Some(d.max_abs),
            mean_kl: Some(d.kl_mean),
            max_kl: Some(d.kl_max),
            top1: Some(d.top1),
            tolerance,
            pass: d.kl_max <= bar.kl_max && d.kl_mean <= bar.kl_mean,
            note: (d.kl_mean > bar.kl_mean).then(|| format!("mean KL {:.1e}, allowed {:.1e}", d.kl_mean, bar.kl_mean)),
            ..row(name)
        }
    };
    // What a run in a type may lose, by what PyTorch loses in it, and how the table says it.
    let pytorch = |narrow: &str| {
        let (found, factor) = (case.pytorch.get(narrow)?, tolerances.kl_factor.get(narrow)?);
        let bar = KlFigures { kl_mean: factor.kl_mean * found.kl_mean, kl_max: factor.kl_max * found.kl_max };
        let of_mean = format!("{} × {:.1e}", factor.kl_mean, found.kl_mean);
        Some((bar, format!("KL ≤ {of_mean}, {} × {:.1e}", factor.kl_max, found.kl_max)))
    };
    // A cache of 16 bits may cost as much as PyTorch loses by running all in them.
    let of_cache = |cache: DType| match cache {
        DType::F32 => None,
        DType::I8 => Some((INT8_CACHE, format!("KL ≤ {:.0e}, {:.0e}", INT8_CACHE.kl_mean, INT8_CACHE.kl_max))),
        _ => pytorch(cache.name()),
    };
    if let Some((cache, bar)) = engine.cache_options().dtype.and_then(|cache| Some((cache, of_cache(cache)?))) {
        for (name, chunk) in [("prefill", tokens.len()), ("decode", 1)] {
            let logits = chunked_logits(&engine, &tokens, chunk)?;
            rows.push(within(&format!("{cache} cache, {name}"), &logits, bar.clone()));
        }
        return Ok(rows);
    }
    let prefill = chunked_logits(&engine, &tokens, tokens.len())?;
    let d = reference.distance(&prefill);
    rows.push(Row {
        max_abs_error: Some(d.max_abs),
        mean_kl: Some(d.kl_mean),
        max_kl: Some(d.kl_max),
        top1: Some(d.top1),
        tolerance: format!("KL ≤ {:.0e}", tolerances.f32_kl_max),
        pass: d.kl_max <= tolerances.f32_kl_max,
        ..row("f32 prefill")
    });
    if mesh.devices() > 1 {
        let one = load(checkpoint, f32, MeshShape::default())?;
        let alone = chunked_logits(&one, &tokens, tokens.len())?;
        let difference = max_difference(prefill.iter().zip(&alone));
        rows.push(Row {
            max_abs_error: Some(difference),
            top1: Some(same_top1(&prefill, &alone, case.vocab_size)),
            tolerance: format!("abs ≤ {MESH_ABSOLUTE:.0e}"),
            pass: difference <= MESH_ABSOLUTE,
            ..row("as one device")
        });
    } else if let Some(worst) = compare_activations(&engine, &tokens, &mut arrays)? {
        rows.push(Row {
            max_abs_error: Some(worst.1),
            tolerance: format!("relative ≤ {:.0e}", tolerances.activation_relative),
            pass: worst.1 <= tolerances.activation_relative,
            note: (worst.1 > tolerances.activation_relative).then(|| format!("largest in {}", worst.0)),
            ..row("activations")
        });
    }
    // One chunk size that divides the text and one that does not.
    let divisor = (2..tokens.len()).rev().find(|d| tokens.len().is_multiple_of(*d)).unwrap_or(1);
    let odd = (5..tokens.len()).rev().find(|d| !tokens.len().is_multiple_of(*d) && *d < tokens.len() / 2).unwrap_or(1);
    for (name, chunk) in [("chunks that divide", divisor), ("chunks that do not", odd), ("decode", 1)] {
        let logits = chunked_logits(&engine, &tokens, chunk)?;
        let difference = max_difference(prefill.iter().zip(&logits));
        rows.push(Row {
            max_abs_error: Some(difference),
            top1: Some(same_top1(&prefill, &logits, case.vocab_size)),
            tolerance: format!("abs ≤ {:.0e}", tolerances.consistency_absolute),
            pass: difference <= tolerances.consistency_absolute,
            ..row(&format!("{name} ({chunk})"))
        });
    }
    if case.text.is_some() || !case.greedy.is_empty() {
        rows.push(check_tokens(case, &engine, checkpoint, &tokens, row("greedy"))?);
    }
    drop(engine);

    for narrow in NARROW {
        let (Some(precision), Some(bar)) = (Precision::parse(narrow), pytorch(narrow)) else { continue };
        let engine = load(checkpoint, precision, mesh)?;
        let logits = chunked_logits(&engine, &tokens, tokens.len())?;
        rows.push(within(&format!("{narrow} prefill"), &logits, bar));
    }
    Ok(rows)
}

fn same_top1(a: &[f32], b: &[f32], vocab: usize) -> f64 {
    let same = a.chunks_exact(vocab).zip(b.chunks_exact(vocab)).filter(|(a, b)| argmax(a) == argmax(b)).count();
    same as f64 / (a.len() / vocab) as f64
}

/// The array with the largest relative error (largest difference over largest value), or none if none is stored.
fn compare_activations(engine: &Engine, tokens: &[u32], arrays: &mut Arrays) -> Result<Option<(String, f64)>, Error> {
    let stored: Vec<String> = arrays.npz.array_names().map(str::to_owned).collect();
    if !stored.iter().any(|name| name == "final_norm") {
        return Ok(None);
    }
    let positions: Vec<i32> = arrays.read("activation_positions")?;
    if positions.iter().any(|&p| usize::try_from(p).is_ok_and(|p| p >= tokens.len()) || p < 0) {
        let what = format!("activation_positions must lie in 0..{}, found {positions:?}", tokens.len());
        return Err(Error::Golden { path: arrays.path.clone(), what });
    }
    let named = Session::new(engine, 1, tokens.len())?.activations(&[tokens.to_vec()])?;
    let mut worst = (String::new(), 0f64);
    let mut compared = 0;
    for name in stored.iter().filter(|n| n.starts_with("layers.") || *n == "embedding" || *n == "final_norm") {
        let reference: Vec<f32> = arrays.read(name)?;
        let Some((_, buffer)) = named.iter().find(|(n, _)| n == name) else {
            let what = format!("array {name} names a value that the model does not have");
            return Err(Error::Golden { path: arrays.path.clone(), what });
        };
        let all = buffer.to_vec::<f32>()?;
        let width = all.len() / tokens.len();
        if width * positions.len() != reference.len() {
            let what =
                format!("array {name} has {} elements, the model's value {width} at a position", reference.len());
            return Err(Error::Golden { path: arrays.path.clone(), what });
        }
        let ours: Vec<f32> = positions.iter().flat_map(|&p| &all[p as usize * width..][..width]).copied().collect();
        let scale = reference.iter().fold(0f64, |m, x| m.max(f64::from(x.abs()))).max(f64::MIN_POSITIVE);
        let relative = max_difference(reference.iter().zip(&ours)) / scale;
        compared += 1;
        if compared == 1 || relative > worst.1 {
            worst = (name.clone(), relative);
        }
    }
    Ok(Some(worst))
}

/// Tokenizer and greedy decoding: ids of the texts, and the tokens that follow each prompt.
fn check_tokens(case: &Case, engine: &Engine, checkpoint: &Checkpoint, tokens: &[u32], row: Row) -> Result<Row, Error> {
    let mut note = None;
    let texts = case.greedy.iter().map(|g| (&g.text, &g.prompt[..])).chain([(&case.text, tokens)]);
    let texts: Vec<(&str, &[u32])> = texts.filter_map(|(text, ids)| Some((text.as_deref()?, ids))).collect();
    if !texts.is_empty() {
        let tokenizer = Tokenizer::of_checkpoint(checkpoint)?;
        for (text, ids) in texts {
            let found = tokenizer.encode(text, true)?;
            if found != ids {
                note = Some(format!("the tokenizer gives {found:?} for {text:?}, expected {ids:?}"));
            }
        }
    }
    let (mut same, mut total) = (0, 0);
    for greedy in &case.greedy {
        let found = greedy_tokens(engine, &greedy.prompt, greedy.tokens.len())?;
        total += greedy.tokens.len();
        same += found.iter().zip(&greedy.tokens).take_while(|(a, b)| a == b).count();
    }
    Ok(Row {
        top1: (total > 0).then(|| f64::from(same as u32) / f64::from(total as u32)),
        tolerance: format!("{total} tokens equal"),
        pass: same == total && note.is_none(),
        note,
        ..row
    })
}

/// `n` greedy tokens after `prompt`, whatever they are.
pub fn greedy_tokens(engine: &Engine, prompt: &[u32], n: usize) -> Result<Vec<u32>, Error> {
    let mut session = Session::new(engine, 1, prompt.len() + n)?;
    session.prefill(&[prompt.to_vec()], &[SamplingOptions::default()], None)?;
    let mut found = Vec::with_capacity(n);
    for i in 0..n {
        let read = session.read_tokens()?;
        if i + 1 < n {
            session.decode()?;
        }
        found.extend(read.wait()?.into_iter().map(|drawn| drawn.id));
    }
    Ok(found)
}

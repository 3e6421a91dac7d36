//! Mixtures of experts: their keys.

use serde_json::Value;

use super::Keys;
use super::family::Sizes;
use crate::error::Result;

/// A mixture of experts (Shazeer et al. 2017), as every layer that has one has it.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts (E).
    pub n_experts: usize,
    /// Experts that a token takes (k).
    pub top_k: usize,
    /// Width of one expert (its F).
    pub d_ff: usize,
    /// How scores become weights.
    pub router: Router,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub normalize: bool,
    /// What the weights are multiplied with in the end.
    pub scale: f64,
    /// Experts in groups, of which only the best are open to a token.
    pub groups: Option<ExpertGroups>,
    /// Whether a learned bias (E) takes part in the choice, but not in the weights (Wang et al. 2024).
    pub correction_bias: bool,
    /// The expert that every token takes.
    pub shared: Option<SharedExpert>,
}

/// The function over the router's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Router {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// Groups of experts (DeepSeek-V3, section 2.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertGroups {
    /// Into how many groups the experts are divided, in order.
    pub count: usize,
    /// How many groups a token chooses, by the sum of their two best scores.
    pub kept: usize,
}

/// An expert that every token takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedExpert {
    /// Its width (F).
    pub d_ff: usize,
    /// Whether sigmoid(x · gate) scales what it gives.
    pub gated: bool,
}

pub(super) fn mixtral(keys: &mut Keys<'_>, sizes: &Sizes) -> Result<MoeConfig> {
    let (n_experts, top_k) = experts(keys, &["num_local_experts"], 8, 2)?;
    Ok(MoeConfig {
        n_experts,
        top_k,
        d_ff: sizes.d_ff,
        router: Router::Softmax,
        normalize: true,
        scale: 1.0,
        groups: None,
        correction_bias: false,
        shared: None,
    })
}

/// qwen2_moe with its shared expert, qwen3_moe without.
pub(super) fn qwen(keys: &mut Keys<'_>, shared: bool) -> Result<MoeConfig> {
    let (experts_default, top_k_default, d_ff) = if shared { (60, 4, 1408) } else { (128, 8, 768) };
    let (n_experts, top_k) = experts(keys, &["num_experts", "num_local_experts"], experts_default, top_k_default)?;
    let shared = match shared {
        true => {
            let d_ff = keys.optional_size("shared_expert_intermediate_size")?.unwrap_or(5632);
            Some(SharedExpert { d_ff, gated: true })
        }
        false => None,
    };
    Ok(MoeConfig {
        n_experts,
        top_k,
        d_ff: keys.optional_size("moe_intermediate_size")?.unwrap_or(d_ff),
        router: Router::Softmax,
        normalize: keys.flag("norm_topk_prob")?,
        scale: 1.0,
        groups: None,
        correction_bias: false,
        shared,
    })
}

pub(super) fn glm4(keys: &mut Keys<'_>) -> Result<MoeConfig> {
    let (n_experts, top_k) = experts(keys, &["n_routed_experts", "num_local_experts", "num_experts"], 128, 8)?;
    let d_ff = keys.optional_size("moe_intermediate_size")?.unwrap_or(1408);
    let count = keys.optional_size("n_group")?.unwrap_or(1);
    let kept = keys.optional_size("topk_group")?.unwrap_or(1);
    if !n_experts.is_multiple_of(count) || n_experts / count < 2 {
        let what =
            format!("{count} groups do not divide n_routed_experts {n_experts} evenly into groups of two or more");
        return Err(keys.error("n_group", what));
    }
    if kept > count || top_k > kept * (n_experts / count) {
        let what = format!(
            "{kept} of {count} groups hold too few experts for num_experts_per_tok {top_k} of n_routed_experts {n_experts}"
        );
        return Err(keys.error("topk_group", what));
    }
    let shared = keys.optional_count("n_shared_experts")?.unwrap_or(1);
    if shared == 0 {
        return Err(keys.error("n_shared_experts", "expected 1 or more, found 0"));
    }
    Ok(MoeConfig {
        n_experts,
        top_k,
        d_ff,
        router: Router::Sigmoid,
        normalize: keys.optional_flag("norm_topk_prob")?.unwrap_or(true),
        scale: keys.positive("routed_scaling_factor")?.unwrap_or(1.0),
        groups: (count > 1).then_some(ExpertGroups { count, kept }),
        correction_bias: true,
        shared: Some(SharedExpert { d_ff: d_ff * shared, gated: false }),
    })
}

/// Which layers have the mixture: every `decoder_sparse_step`-th that `mlp_only_layers` does not name.
pub(super) fn sparse_steps(keys: &mut Keys<'_>, sizes: &Sizes) -> Result<Vec<bool>> {
    let step = keys.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let dense: Vec<usize> = match keys.get("mlp_only_layers") {
        None => Vec::new(),
        Some(value) => {
            let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
            let list = value.as_array().and_then(|list| list.iter().map(number).collect());
            list.ok_or_else(|| keys.error("mlp_only_layers", format!("expected a list of layers, found {value}")))?
        }
    };
    Ok((0..sizes.n_layers).map(|i| (i + 1).is_multiple_of(step) && !dense.contains(&i)).collect())
}

/// E and k. The first of `names` is the family's own; the others are accepted where they say the same.
fn experts(keys: &mut Keys<'_>, names: &[&'static str], e: usize, k: usize) -> Result<(usize, usize)> {
    let mut found: Option<(&str, usize)> = None;
    for &name in names {
        match (found, keys.optional_size(name)?) {
            (Some((other, first)), Some(here)) if first != here => {
                return Err(keys.error(name, format!("{here} contradicts {other}, which says {first}")));
            }
            (None, Some(here)) => found = Some((name, here)),
            _ => {}
        }
    }
    let e = found.map_or(e, |(_, e)| e);
    let k = keys.optional_size("num_experts_per_tok")?.unwrap_or(k);
    match k <= e {
        true => Ok((e, k)),
        false => Err(keys.error("num_experts_per_tok", format!("{k} is more than the {e} experts that there are"))),
    }
}

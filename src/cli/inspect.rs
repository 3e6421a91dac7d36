//! `xllama inspect`.

use std::process::ExitCode;

use serde_json::json;

use xllama::config::{LayerConfig, ModelConfig};

use super::model_args::ModelArg;
use super::progress::mebibytes;
use super::{Context, table};

/// Show a model's configuration and parameters.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama inspect --model smollm2-135m")]
pub struct Args {
    #[command(flatten)]
    model: ModelArg,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let checkpoint = self.model.open(context)?;
        let cfg = checkpoint.config();
        let params = checkpoint.params().iter();
        let dtype = |p: &converter::Param| p.packing.map_or(p.dtype.name(), |packing| packing.name());
        let (elements, total) = params.iter().fold((0, 0), |(n, b), p| (n + p.elements(), b + p.stored_bytes()));
        let rows: Vec<serde_json::Value> = params
            .iter()
            .map(|p| {
                json!({
                    "name": p.name, "hf_name": p.pieces[0].name, "hf_tensors": p.pieces.len(), "axes": p.axes, "shape": p.shape,
                    "dtype": dtype(p), "packing": p.packing.map(converter::Packing::to_json), "sharding": p.logical,
                    "bytes": p.stored_bytes(),
                })
            })
            .collect();
        let json = json!({
            "path": checkpoint.path(), "config": cfg.raw, "parameters": rows,
            "total_parameters": elements, "total_bytes": total,
        });
        context.print(&json, || {
            println!("{}", checkpoint.path().display());
            println!(
                "{}: L {} layers, M {} d_model, H {} heads, G {} key/value heads, K {} head_dim, F {} d_ff, V {} vocabulary",
                cfg.model_type, cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff, cfg.vocab_size
            );
            println!(
                "context {}, {:?}, head {}{}",
                cfg.context_len(),
                cfg.hidden_act,
                if cfg.tie_word_embeddings { "tied" } else { "separate" },
                blocks(cfg),
            );
            for (i, rope) in cfg.ropes.iter().enumerate() {
                println!("rope {i}: {} of {} elements, theta {}, {}", rope.dim, cfg.head_dim, rope.theta, rope.kind.name());
            }
            println!();
            let cells: Vec<Vec<String>> = params
                .iter()
                .map(|p| {
                    let shape: Vec<String> = p.shape.iter().map(usize::to_string).collect();
                    vec![
                        p.name.clone(),
                        p.axes.clone(),
                        shape.join(" × "),
                        p.packing.map_or(p.dtype.name().into(), |packing| packing.to_string()),
                        p.logical.join(", "),
                        mebibytes(p.stored_bytes()),
                    ]
                })
                .collect();
            table::print(&["parameter", "axes", "shape", "dtype", "sharding", "size"], &cells, &[5]);
            println!("\n{} arrays, {elements} parameters, {}", params.len(), mebibytes(total));
        });
        Ok(ExitCode::SUCCESS)
    }
}

/// What the model has beside Llama's blocks, for people: `, windows of 512 on 15 of 18 layers`.
fn blocks(cfg: &ModelConfig) -> String {
    let count = |f: &dyn Fn(&LayerConfig) -> bool| cfg.layers.iter().filter(|layer| f(layer)).count();
    let of = |n: usize| format!("on {n} of {} layers", cfg.n_layers);
    let mut text = String::new();
    for window in cfg.windows() {
        text += &format!(", window of {window} {}", of(count(&|layer| layer.window == Some(window))));
    }
    if let still @ 1.. = count(&|layer| layer.rope.is_none()) {
        text += &format!(", no rotation {}", of(still));
    }
    if let Some(moe) = &cfg.moe {
        text += &format!(", {} of {} experts {}", moe.top_k, moe.n_experts, of(count(&|layer| layer.sparse)));
    }
    text
}

//! `xllama inspect`.

use std::process::ExitCode;

use serde_json::json;

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
        let bytes = |p: &converter::Param| (p.elements() * p.dtype.size()) as u64;
        let (elements, total) = params.iter().fold((0, 0), |(n, b), p| (n + p.elements(), b + bytes(p)));
        let rows: Vec<serde_json::Value> = params
            .iter()
            .map(|p| {
                json!({
                    "name": p.name, "hf_name": p.hf_name, "axes": p.axes, "shape": p.shape,
                    "dtype": p.dtype.name(), "sharding": p.logical, "bytes": bytes(p),
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
                "context {}, rope {:?}, {:?}, head {}\n",
                cfg.max_position_embeddings,
                cfg.rope,
                cfg.hidden_act,
                if cfg.tie_word_embeddings { "tied" } else { "separate" }
            );
            let cells: Vec<Vec<String>> = params
                .iter()
                .map(|p| {
                    let shape: Vec<String> = p.shape.iter().map(usize::to_string).collect();
                    vec![
                        p.name.clone(),
                        p.axes.into(),
                        shape.join(" × "),
                        p.dtype.name().into(),
                        p.logical.join(", "),
                        mebibytes(bytes(p)),
                    ]
                })
                .collect();
            table::print(&["parameter", "axes", "shape", "dtype", "sharding", "size"], &cells, &[5]);
            println!("\n{} arrays, {elements} parameters, {}", params.len(), mebibytes(total));
        });
        Ok(ExitCode::SUCCESS)
    }
}

//! Variables of a chat template.

use serde_json::Value;
use xllama::text::RenderOptions;

/// `--template-var`.
#[derive(clap::Args, Clone)]
pub struct TemplateArgs {
    /// Set a variable of the chat template, as JSON or else as text, for example enable_thinking=false; may be given several times.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    template_var: Vec<(String, Value)>,
}

impl TemplateArgs {
    /// How a prompt is rendered that the model is to answer.
    pub fn options(&self) -> RenderOptions {
        let variables = self.template_var.iter().cloned().collect();
        RenderOptions { add_generation_prompt: true, variables, ..RenderOptions::default() }
    }

    /// Whether a variable is given.
    pub fn is_given(&self) -> bool {
        !self.template_var.is_empty()
    }
}

fn parse_variable(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE, for example enable_thinking=false")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string()));
    Ok((name.to_string(), value))
}

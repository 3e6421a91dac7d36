//! Keys of `config.json` that need no reading: those without effect on inference, and those with one supported value.

use serde_json::Value;

/// Keys whose value changes nothing in a forward pass: bookkeeping, training, and defaults of generation.
const HARMLESS: &[&str] = &[
    // bookkeeping
    "attn_implementation",
    // the repository's own Python code, which transformers does not run unless told; the model type says which model it is
    "auto_map",
    "finetuning_task",
    "id2label",
    "is_llama_config",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_sequence_length",
    // read by the families whose windows it moves
    "max_window_layers",
    "model_max_length",
    "name_or_path",
    "prefix",
    "problem_type",
    "sep_token_id",
    "sliding_window_size",
    "decoder_start_token_id",
    "task_specific_params",
    "tokenizer_class",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    // output options, caching, and splits of the same sums
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "return_dict",
    "return_dict_in_generate",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
    // training
    "attention_dropout",
    "embd_pdrop",
    "gradient_checkpointing",
    "hidden_dropout",
    "initializer_range",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "loss_type",
    "neftune_noise_alpha",
    "resid_pdrop",
    // defaults of generation, which transformers 4 wrote here
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// The only supported value of a key that changes the result, as messages print it; null is supported for all.
pub(super) fn required_value(key: &str) -> Option<&'static str> {
    Some(match key {
        "add_cross_attention" | "is_encoder_decoder" | "rope_interleaved" | "use_bidirectional_attention" => "false",
        // where the family has no such thing; those that have one read the key
        "attention_bias" | "mlp_bias" | "qkv_bias" | "lm_head_bias" | "use_mrope" | "use_sliding_window" => "false",
        "full_attn_mod" | "interpolate_factor" => "1.0",
        "shared_expert_intermediate_size" => "0",
        "layer_types" => "\"full_attention\" for every layer",
        "pruned_heads" => "{}",
        "quantization_config" | "compression_config" => "none (dequantize the checkpoint first)",
        "sliding_window" => "null",
        _ => return None,
    })
}

/// Whether a key can be passed over with this value. Keys that begin with an underscore are transformers' private
/// bookkeeping.
pub(super) fn changes_nothing(key: &str, value: &Value) -> bool {
    match required_value(key) {
        Some("false") => value == &Value::Bool(false),
        Some("1.0") => value.as_f64() == Some(1.0),
        Some("0") => value.as_u64() == Some(0),
        Some("{}") => value.as_object().is_some_and(|o| o.is_empty()),
        Some(_) if key == "layer_types" => {
            value.as_array().is_some_and(|layers| layers.iter().all(|kind| kind == "full_attention"))
        }
        Some(_) => false,
        None => key.starts_with('_') || HARMLESS.contains(&key),
    }
}

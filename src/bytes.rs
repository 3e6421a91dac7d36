//! Numbers of bytes as people write them.

/// Reads `1000`, `500MiB`, `4GB`: a whole number and a unit.
///
/// # Errors
/// What was required; the caller says of which text.
///
/// ```
/// assert_eq!(xllama::bytes::parse("2KiB"), Ok(2048));
/// assert!(xllama::bytes::parse("5 apples").unwrap_err().contains("unit"));
/// ```
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[digits..] {
        "" | "B" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        other => return Err(format!("unknown unit {other:?}; use B, KB, MB, GB, KiB, MiB or GiB")),
    };
    let number: u64 = match &text[..digits] {
        "" => return Err("must begin with a whole number".into()),
        number => number.parse().map_err(|_| "must fit 64 bits".to_string())?,
    };
    number.checked_mul(unit).ok_or_else(|| "must fit 64 bits".into())
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn numbers_and_units() {
        for (text, bytes) in [("0", 0), ("17", 17), ("17B", 17), ("3KB", 3000), ("512MiB", 1 << 29), ("4GiB", 1 << 32)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for (text, why) in [
            ("", "whole number"),
            ("GiB", "whole number"),
            ("-1", "unit"),
            ("1.5GiB", "unit"),
            ("4 GiB", "unit"),
            ("4gib", "unit"),
            ("99999999999999999999", "64 bits"),
            ("18446744073709551615KB", "64 bits"),
        ] {
            assert!(parse(text).unwrap_err().contains(why), "{text}");
        }
    }
}

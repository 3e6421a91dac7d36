//! What a compiler says when a program does not fit, in bytes.

/// Memory of one device that a program needs and that there is, by the compiler's message; it gives four digits or so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Needed in all.
    pub needed: u64,
    /// There is, for programs.
    pub limit: u64,
}

impl Shortage {
    /// Reads the two messages of the TPU compiler: the one that it gives before it lays out memory, and the one after.
    ///
    /// `… the total memory required for HLO temporaries (16.78G) exceeds available HBM (15.75G)` (arguments are among those
    /// temporaries) and `Ran out of memory in memory space hbm. Used 16.78G of 15.75G hbm.`
    pub fn parse(message: &str) -> Option<Shortage> {
        let after = |text: &'static str, from: usize| {
            let at = message.get(from..)?.find(text)? + from + text.len();
            Some((amount(message.get(at..)?)?, at))
        };
        let found = |first, second| {
            let (needed, at) = after(first, 0)?;
            let (limit, _) = after(second, at)?;
            Some(Shortage { needed, limit })
        };
        found("memory required for HLO temporaries (", "exceeds available HBM (").or_else(|| found("Used ", " of "))
    }
}

/// Whether an error says that memory does not suffice, in whatever words.
pub fn is_shortage(error: &xla::pjrt::Error) -> bool {
    let text = error.to_string();
    error.code() == Some(xla::pjrt::Code::ResourceExhausted) || text.contains("Ran out of memory")
}

/// Reads `16.78G`, `258.00M`, `1.5K`, `12B` or `12` at the beginning of `text`; units are powers of 1024.
fn amount(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    let scale = match text[end..].chars().next() {
        Some('K') => 1u64 << 10,
        Some('M') => 1 << 20,
        Some('G') => 1 << 30,
        Some('T') => 1 << 40,
        _ => 1,
    };
    Some((number * scale as f64).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    #[test]
    fn both_messages_of_the_tpu_compiler_are_read() {
        let early = "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries \
                     (16.78G) exceeds available HBM (15.75G). HLO module: main.\nSee https://openxla.org for more.";
        let late = "Ran out of memory in memory space hbm. Used 16.78G of 15.75G hbm. Exceeded hbm capacity by 1.03G.";
        let expected = Shortage { needed: (16.78 * GIB).round() as u64, limit: (15.75 * GIB).round() as u64 };
        assert_eq!(Shortage::parse(early), Some(expected));
        assert_eq!(Shortage::parse(late), Some(expected));
    }

    #[test]
    fn other_messages_are_not_misread() {
        for text in
            ["", "Used cars", "Used 3G", "memory required for HLO temporaries (", "Used .. of .. hbm", "Used 5é of"]
        {
            assert_eq!(Shortage::parse(text), None, "{text}");
        }
    }

    #[test]
    fn amounts_have_units() {
        let read = ["512", "512B", "1.5K", "258.00M", "2T"].map(amount);
        assert_eq!(read, [Some(512), Some(512), Some(1536), Some(258 << 20), Some(2 << 40)]);
        assert_eq!([amount("G"), amount(""), amount("1.2.3G")], [None; 3]);
    }
}

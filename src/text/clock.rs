//! `strftime` as Python gives it for a time without a zone, in the C locale.

use jiff::civil::DateTime;
use jiff::fmt::strtime::BrokenDownTime;

/// The local time, what `datetime.now()` is in Python.
pub(super) fn now() -> DateTime {
    jiff::Zoned::now().datetime()
}

/// `datetime.strftime(format)`. A directive that nobody knows is copied as it stands, as glibc does.
pub(super) fn strftime(time: DateTime, format: &str) -> String {
    let broken_down = BrokenDownTime::from(time);
    let mut out = String::new();
    let mut rest = format;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let directive = directive(&rest[at..]);
        rest = &rest[at + directive.len()..];
        let translated = match directive {
            "%c" => "%a %b %e %H:%M:%S %Y",
            "%x" => "%m/%d/%y",
            "%X" => "%H:%M:%S",
            "%r" => "%I:%M:%S %p",
            "%f" => "%6f",
            // A time without a zone has no name for it and no offset.
            "%z" | "%Z" | "%:z" => continue,
            other => other,
        };
        match broken_down.to_string(translated) {
            Ok(text) => out.push_str(&text),
            Err(_) => out.push_str(directive),
        }
    }
    out.push_str(rest);
    out
}

/// The directive that `text` starts with: `%`, glibc's flags, one character.
fn directive(text: &str) -> &str {
    let flags = text[1..].chars().take_while(|c| "-_0^#:".contains(*c)).count();
    let last = text[1 + flags..].chars().next().map_or(0, char::len_utf8);
    &text[..1 + flags + last]
}

#[cfg(test)]
mod tests {
    use jiff::civil::date;

    use super::*;

    /// Each line is what Python 3.11 on Linux printed for datetime(2024, 2, 3, 4, 5, 6, 7000).
    #[test]
    fn directives_are_pythons() {
        let time = date(2024, 2, 3).at(4, 5, 6, 7_000_000);
        for (format, expected) in [
            ("%d %b %Y", "03 Feb 2024"),
            ("%Y-%m-%d", "2024-02-03"),
            ("%B %d, %Y", "February 03, 2024"),
            ("%A %a %H:%M:%S", "Saturday Sat 04:05:06"),
            ("%-d/%-m %e|%k|%l", "3/2  3| 4| 4"),
            ("%I %p %y %j %U %W %u %w", "04 AM 24 034 04 05 6 6"),
            ("%G-W%V %C %h", "2024-W05 20 Feb"),
            ("%f %% %n|%t|", "007000 % \n|\t|"),
            (
                "%c|%x|%X|%D|%F|%T|%R|%r",
                "Sat Feb  3 04:05:06 2024|02/03/24|04:05:06|02/03/24|2024-02-03|04:05:06|04:05|04:05:06 AM",
            ),
            ("a%zb%Zc", "abc"),
            ("%Q é%é %", "%Q é%é %"),
            ("", ""),
        ] {
            assert_eq!(strftime(time, format), expected, "{format}");
        }
    }
}

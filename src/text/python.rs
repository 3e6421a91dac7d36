//! Python where a template can see it: `str` and `repr` of values, `json.dumps`, methods of `str` and `list`.
//!
//! Chat templates are written for Jinja in Python. Minijinja is Jinja in Rust and leaves these to its user; most
//! string methods come from `minijinja-contrib`, and the ones below are those that it lacks or answers differently.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State, Value};

/// `{{ value }}`: what Python's `str` gives; nothing for an undefined value.
pub(super) fn write_value(out: &mut Output, _: &State, value: &Value) -> Result<(), Error> {
    out.write_str(&to_str(value)).map_err(Error::from)
}

/// Python's `str(value)`.
pub(super) fn to_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None => repr(value),
    }
}

/// Python's `repr(value)`; a tuple looks like the list that minijinja makes of it.
fn repr(value: &Value) -> String {
    let items = |open: &str, close: &str, item: &dyn Fn(Value) -> String| {
        let items: Vec<String> = value.try_iter().into_iter().flatten().map(item).collect();
        format!("{open}{}{close}", items.join(", "))
    };
    match value.kind() {
        ValueKind::String => repr_str(value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), repr_float)
        }
        ValueKind::Seq | ValueKind::Iterable => items("[", "]", &|item| repr(&item)),
        ValueKind::Map => {
            items("{", "}", &|key| format!("{}: {}", repr(&key), repr(&value.get_item(&key).unwrap_or_default())))
        }
        _ => value.to_string(),
    }
}

fn repr_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Python's `repr` of a float: the shortest digits that read back the same, with an exponent from 1e16 and below 1e-4.
fn repr_float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{x:?}")
}

/// The `tojson` filter of `transformers`: `json.dumps(x, ensure_ascii=False, indent=None, separators=None,
/// sort_keys=False)`, which escapes nothing for HTML.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    separators: Option<Vec<String>>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let flag = |name: &str| kwargs.get::<Option<bool>>(name).map(|flag| flag.unwrap_or(false));
    let indent = indent.or(kwargs.get("indent")?).filter(|v| !v.is_none());
    let indent = match indent {
        None => None,
        Some(width) => Some(match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(i64::try_from(width)?.clamp(0, 64) as usize),
        }),
    };
    let (item, key) = match separators.or(kwargs.get::<Option<Vec<String>>>("separators")?).as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators takes two strings")),
    };
    let style = Json {
        ensure_ascii: ensure_ascii.map_or_else(|| flag("ensure_ascii"), Ok)?,
        sort_keys: flag("sort_keys")?,
        indent,
        item,
        key,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
}

/// The arguments of `json.dumps`.
struct Json {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Json {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&match repr(value).as_str() {
                "nan" => "NaN".to_owned(),
                "inf" => "Infinity".to_owned(),
                "-inf" => "-Infinity".to_owned(),
                number => number.to_owned(),
            }),
            ValueKind::String => self.write_str(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_all(out, ['[', ']'], &items, depth, |out, item| self.write(out, item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_all(out, ['{', '}'], &keys, depth, |out, key| {
                    match key.kind() {
                        ValueKind::None => out.push_str("\"null\""),
                        ValueKind::Bool => out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" }),
                        _ => self.write_str(out, &to_str(key)),
                    }
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                let message = format!("tojson: a value of type {kind} has no JSON form");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_all(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut write: impl FnMut(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn write_str(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// The `length` filter: an undefined value has none of anything.
pub(super) fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { minijinja::filters::length(value) }
}

/// The `replace` filter: at most `count` times, from the left.
pub(super) fn replace(text: &Value, old: &Value, new: &Value, count: Option<i64>) -> String {
    let count = count.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    to_str(text).replacen(&to_str(old), &to_str(new), count)
}

/// The `trim` filter: `str.strip`.
pub(super) fn trim(text: &Value, chars: Option<&str>) -> String {
    let text = to_str(text);
    text.trim_matches(|c| stripped(c, chars)).to_owned()
}

/// Whether `str.strip(chars)` takes `c` off.
fn stripped(c: char, chars: Option<&str>) -> bool {
    chars.map_or_else(|| is_space(c), |chars| chars.contains(c))
}

/// `str.isspace` of one character: Unicode's white space, and the separators that ASCII has for files and records.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// The `title` filter: every word with one capital, where words end at white space, `-`, `(`, `{`, `[` and `<` only.
pub(super) fn title(text: &Value) -> String {
    let mut first = true;
    let mut out = String::new();
    for c in to_str(text).chars() {
        if first {
            out.extend(c.to_uppercase());
        } else {
            out.extend(c.to_lowercase());
        }
        first = is_space(c) || "-({[<".contains(c);
    }
    out
}

/// The `join` filter: what `str` makes of each item.
pub(super) fn join(items: &Value, between: Option<&str>) -> Result<String, Error> {
    let items: Vec<String> = items.try_iter()?.map(|item| to_str(&item)).collect();
    Ok(items.join(between.unwrap_or_default()))
}

/// The `escape` filter, for HTML: what is safe already stays.
pub(super) fn escape(text: &Value) -> Value {
    if text.is_safe() {
        return text.clone();
    }
    let text = to_str(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    Value::from_safe_string(text.replace('\'', "&#39;").replace('"', "&#34;"))
}

/// The `upper` filter.
pub(super) fn upper(text: &Value) -> String {
    to_str(text).to_uppercase()
}

/// The `lower` filter.
pub(super) fn lower(text: &Value) -> String {
    to_str(text).to_lowercase()
}

/// The `int` filter: `default` for what is no number.
pub(super) fn int(state: &State, value: &Value, default: Option<i64>) -> Value {
    minijinja::filters::int(state, value).unwrap_or_else(|_| Value::from(default.unwrap_or(0)))
}

/// The `float` filter: `default` for what is no number.
pub(super) fn float(state: &State, value: &Value, default: Option<f64>) -> Value {
    minijinja::filters::float(state, value).unwrap_or_else(|_| Value::from(default.unwrap_or(0.0)))
}

/// The `sequence` test: whatever has a length and items, so strings and mappings too.
pub(super) fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Iterable | Map | Seq | String | Undefined)
}

/// The `iterable` test: all of these, and not `none`.
pub(super) fn is_iterable(value: &Value) -> bool {
    is_sequence(value)
}

/// The `number` test: a truth value is one.
pub(super) fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// A method that minijinja does not know: Python's for strings and lists.
pub(super) fn call_method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let known = match value.as_str() {
        Some(text) => string_method(text, method, args)?,
        None if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) => list_method(value, method, args)?,
        // Nothing changes a dict, so a copy of it is the dict.
        None if value.kind() == ValueKind::Map && method == "copy" && args.is_empty() => Some(value.clone()),
        None => None,
    };
    match known {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let every = |predicate: fn(char) -> bool| -> Result<Option<Value>, Error> {
        let () = from_args(args)?;
        Ok(Some(Value::from(!text.is_empty() && text.chars().all(predicate))))
    };
    let chars = |end: usize| text[..end].chars().count() as i64;
    Ok(Some(match method {
        "isalpha" => return every(char::is_alphabetic),
        "isalnum" => return every(char::is_alphanumeric),
        "isdigit" | "isnumeric" | "isdecimal" => return every(char::is_numeric),
        "isspace" => return every(is_space),
        "islower" | "isupper" => {
            let () = from_args(args)?;
            let wrong = if method == "islower" { char::is_uppercase } else { char::is_lowercase };
            let right = if method == "islower" { char::is_lowercase } else { char::is_uppercase };
            Value::from(text.chars().any(right) && !text.chars().any(wrong))
        }
        "find" | "index" => {
            let (what,): (&str,) = from_args(args)?;
            found(text.find(what).map(chars), method, what)?
        }
        "rfind" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            found(text.rfind(what).map(chars), method, what)?
        }
        "count" => {
            let (what,): (&str,) = from_args(args)?;
            Value::from(text.matches(what).count())
        }
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let at_end = |c| stripped(c, chars);
            Value::from(match method {
                "strip" => text.trim_matches(at_end),
                "lstrip" => text.trim_start_matches(at_end),
                _ => text.trim_end_matches(at_end),
            })
        }
        "removeprefix" => {
            let (what,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(what).unwrap_or(text))
        }
        "removesuffix" => {
            let (what,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(what).unwrap_or(text))
        }
        "partition" => {
            let (sep,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(sep).unwrap_or((text, ""));
            strings([before, if text.contains(sep) { sep } else { "" }, after])
        }
        "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            let (before, after) = text.rsplit_once(sep).unwrap_or(("", text));
            strings([before, if text.contains(sep) { sep } else { "" }, after])
        }
        "split" | "rsplit" => {
            let (sep, limit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = sep.or(kwargs.get::<Option<&str>>("sep")?);
            let limit = limit.or(kwargs.get::<Option<i64>>("maxsplit")?).and_then(|n| usize::try_from(n).ok());
            kwargs.assert_all_used()?;
            if sep == Some("") {
                return Err(Error::new(ErrorKind::InvalidOperation, "split: empty separator"));
            }
            strings(split(text, sep, limit.unwrap_or(usize::MAX), method == "rsplit"))
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(kwargs.get::<Option<bool>>("keepends")?).unwrap_or(false);
            kwargs.assert_all_used()?;
            strings(lines(text, keep))
        }
        _ => return Ok(None),
    }))
}

fn strings<'t>(items: impl IntoIterator<Item = &'t str>) -> Value {
    items.into_iter().map(Value::from).collect()
}

/// The answer of `find` (-1 for nothing) or of `index` (an error for nothing).
fn found(at: Option<i64>, method: &str, what: &str) -> Result<Value, Error> {
    match at {
        None if method.ends_with("index") => {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: {what:?} is not in the string")))
        }
        at => Ok(Value::from(at.unwrap_or(-1))),
    }
}

/// `str.split` and `str.rsplit`: at `sep`, or at runs of white space with none at either end.
fn split<'t>(text: &'t str, sep: Option<&str>, limit: usize, from_right: bool) -> Vec<&'t str> {
    let mut parts = Vec::new();
    let mut rest = text;
    let blank = sep.is_none();
    loop {
        if blank {
            rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
        }
        let cut = match (sep, from_right) {
            _ if parts.len() == limit => None,
            (Some(sep), false) => rest.split_once(sep),
            (Some(sep), true) => rest.rsplit_once(sep).map(|(left, right)| (right, left)),
            (None, false) => rest.split_once(is_space),
            (None, true) => rest.rsplit_once(is_space).map(|(left, right)| (right, left)),
        };
        match cut {
            Some((part, remaining)) => {
                parts.push(part);
                rest = remaining;
            }
            None => {
                if !(blank && rest.is_empty()) {
                    parts.push(rest);
                }
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `str.splitlines`: every line boundary that Python knows, "\r\n" as one.
fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    const ENDS: [char; 10] =
        ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| ENDS.contains(c)) {
        let after = at + if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        lines.push(&rest[..if keep_ends { after } else { at }]);
        rest = &rest[after..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn list_method(list: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "index" => {
            let (what,): (Value,) = from_args(args)?;
            match list.try_iter()?.position(|item| item == what) {
                Some(at) => Value::from(at),
                None => {
                    let message = format!("index: {} is not in the list", repr(&what));
                    return Err(Error::new(ErrorKind::InvalidOperation, message));
                }
            }
        }
        "copy" => {
            let () = from_args(args)?;
            list.try_iter()?.collect()
        }
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    /// The value of an expression with everything of this file in place.
    fn eval(expression: &str) -> String {
        let mut env = Environment::new();
        env.set_formatter(super::write_value);
        env.set_unknown_method_callback(super::call_method);
        env.add_filter("tojson", super::tojson);
        env.add_filter("int", super::int);
        env.add_filter("float", super::float);
        env.add_filter("title", super::title);
        env.add_filter("e", super::escape);
        env.add_filter("trim", super::trim);
        env.add_filter("join", super::join);
        let source = format!("{{{{ {expression} }}}}");
        env.render_str(&source, context!()).unwrap_or_else(|error| format!("error: {:?}", error.kind()))
    }

    /// Each line was printed by Python 3.11 with Jinja 3.1.6 as transformers 5.23.0 sets it up.
    #[test]
    fn values_and_methods_are_pythons() {
        for (expression, expected) in [
            (
                "[1e16, 1e22, 1e-5, 0.0001, -0.0, 123456789.123, 2.0]",
                "[1e+16, 1e+22, 1e-05, 0.0001, -0.0, 123456789.123, 2.0]",
            ),
            ("5e-324", "5e-324"),
            (r#"["it's", 'a"b', "\n\té", "\\"]"#, r#"["it's", 'a"b', '\n\té', '\\']"#),
            ("{'a': [none, true, {'b': 'c'}]}", "{'a': [None, True, {'b': 'c'}]}"),
            ("'é😀\\x01'|tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude00\u0001""#),
            ("{1: 2, none: 3}|tojson", r#"{"1": 2, "null": 3}"#),
            ("[]|tojson(indent=2)", "[]"),
            ("{'a': [1]}|tojson(indent='--')", "{\n--\"a\": [\n----1\n--]\n}"),
            ("nothing|tojson", "error: InvalidOperation"),
            ("'a,b,c'.split(',', maxsplit=1)", "['a', 'b,c']"),
            ("'a b  c '.split(none, 1)", "['a', 'b  c ']"),
            ("' a  b c'.rsplit(none, 1)", "[' a  b', 'c']"),
            ("'a,b,c'.rsplit(',')", "['a', 'b', 'c']"),
            ("''.split()", "[]"),
            ("''.split(',')", "['']"),
            ("'a'.split('')", "error: InvalidOperation"),
            ("'a\\n\\nb\\r\\nc\\u2028d\\n'.splitlines()", "['a', '', 'b', 'c', 'd']"),
            ("'a\\r\\nb'.splitlines(true)", "['a\\r\\n', 'b']"),
            ("'héllo'.find('l')", "2"),
            ("'héllo'.rfind('l')", "3"),
            ("'héllo'.index('z')", "error: InvalidOperation"),
            ("'abc'.count('')", "4"),
            ("'a=b=c'.partition('=')[2]", "b=c"),
            ("'a=b=c'.rpartition('=')[0]", "a=b"),
            ("'abc'.rpartition('=')[2]", "abc"),
            (
                "'A1'.isupper() ~ '1'.isupper() ~ 'aB'.islower() ~ ''.isalnum() ~ ' '.isspace()",
                "TrueFalseFalseFalseTrue",
            ),
            ("['a', 'b'].index('b')", "1"),
            ("['a'].index('b')", "error: InvalidOperation"),
            ("['a'].copy()", "['a']"),
            ("'x'|int(7)", "7"),
            ("'2.5'|float + 'x'|float + 'x'|float(1)", "3.5"),
            ("'doc_id they\\'re (aB) x-y'|title", "Doc_id They're (Ab) X-Y"),
            ("[1.0, ['a'], none, 1e20]|join('|')", "1.0|['a']|None|1e+20"),
            ("'abc'|join", "abc"),
            ("'<a href=\\'/\\'>\"&'|e", "&lt;a href=&#39;/&#39;&gt;&#34;&amp;"),
            ("'<'|e|e ~ '<'|safe|e", "&lt;<"),
            ("'\\x1c a\\x1f\\x85\\u3000\\u200b'|trim == 'a\\x1f\\x85\\u3000\\u200b'", "True"),
            (
                "'\\x1ca\\x1f'.strip() ~ 'xay'.strip('xy') ~ 'xx'.strip('x') ~ ' b'.lstrip() ~ 'c\\n'.rstrip('\\n')",
                "aabc",
            ),
            ("'a\\x1cb'.split()", "['a', 'b']"),
            ("{'a': [1]}.copy()", "{'a': [1]}"),
            ("['a'].append('b')", "error: UnknownMethod"),
        ] {
            assert_eq!(eval(expression), expected, "{expression}");
        }
    }
}

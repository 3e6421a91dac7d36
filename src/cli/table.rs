//! Tables that line up.

use unicode_width::UnicodeWidthStr;

/// Prints rows under a header; the columns named in `right` are aligned to the right.
pub fn print(header: &[&str], rows: &[Vec<String>], right: &[usize]) {
    let width = |s: &str| s.width();
    let columns: Vec<usize> = (0..header.len())
        .map(|c| rows.iter().map(|r| width(&r[c])).chain([width(header[c])]).max().unwrap_or(0))
        .collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().enumerate().map(|(c, cell)| {
            let pad = " ".repeat(columns[c] - width(cell));
            if right.contains(&c) { pad + cell } else { cell.clone() + &pad }
        });
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(&header.iter().map(|h| h.to_string()).collect::<Vec<_>>());
    line(&columns.iter().map(|w| "─".repeat(*w)).collect::<Vec<_>>());
    rows.iter().for_each(|r| line(r));
}

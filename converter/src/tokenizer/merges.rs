//! The merge list of a SentencePiece BPE model, which stores only pieces and their scores.

use std::collections::HashMap;

/// A piece that merging may produce.
pub(super) struct Scored<'a> {
    pub(super) text: &'a str,
    pub(super) score: f32,
}

/// All ways to put a piece together from two, those of the highest score first.
///
/// SentencePiece joins the two neighbours whose union has the highest score; the equivalent list of ranked pairs has,
/// for every piece, all its splits into two pieces. Among equal scores the longer left part comes first, then the
/// longer right part (in characters), then the order of `pieces` and of the parts in it: the order in which
/// transformers' converter lists them.
pub(super) fn from_scores<'a>(pieces: &[Scored<'a>]) -> Vec<[&'a str; 2]> {
    let index: HashMap<&str, usize> = pieces.iter().enumerate().map(|(index, piece)| (piece.text, index)).collect();
    struct Merge {
        piece: usize,
        left: usize,
        right: usize,
        chars: (usize, usize),
    }
    let mut merges = Vec::new();
    for (piece, Scored { text, .. }) in pieces.iter().enumerate() {
        let length = text.chars().count();
        for (chars, (at, _)) in text.char_indices().enumerate().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left), Some(&right)) = (index.get(left), index.get(right)) {
                merges.push(Merge { piece, left, right, chars: (chars, length - chars) });
            }
        }
    }
    let score = |merge: &Merge| pieces[merge.piece].score;
    merges.sort_by(|a, b| {
        score(b)
            .total_cmp(&score(a))
            .then(b.chars.cmp(&a.chars))
            .then((a.piece, a.left, a.right).cmp(&(b.piece, b.left, b.right)))
    });
    merges.iter().map(|merge| [pieces[merge.left].text, pieces[merge.right].text]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merges(pieces: &[(&'static str, f32)]) -> Vec<[&'static str; 2]> {
        from_scores(&pieces.iter().map(|&(text, score)| Scored { text, score }).collect::<Vec<_>>())
    }

    #[test]
    fn higher_scores_come_first_and_single_characters_have_no_split() {
        let found = merges(&[("abc", -1.0), ("ab", 0.0), ("a", -2.0), ("b", -3.0), ("c", -4.0), ("é", -5.0)]);
        assert_eq!(found, [["a", "b"], ["ab", "c"]]);
    }

    #[test]
    fn all_splits_of_a_piece_longer_left_first() {
        let found = merges(&[("ab", -1.0), ("bc", -2.0), ("abc", -3.0), ("a", -4.0), ("b", -5.0), ("c", -6.0)]);
        assert_eq!(found, [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]);
    }

    #[test]
    fn lengths_are_in_characters_not_bytes() {
        // Equal scores: in bytes "▁|a" (3 and 1) would come before "é|éé" (2 and 4).
        let found = merges(&[("▁a", 0.0), ("ééé", 0.0), ("éé", -1.0), ("▁", -2.0), ("a", -3.0), ("é", -4.0)]);
        assert_eq!(found, [["éé", "é"], ["é", "éé"], ["▁", "a"], ["é", "é"]]);
    }
}

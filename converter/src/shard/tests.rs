//! Pins that a broken or hostile safetensors file is one clear error, and that our verdict is that of the safetensors
//! library.

use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;

/// A file of this header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![1; data]].concat()
}

fn open(bytes: &[u8]) -> Result<Shard> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).expect("writable");
    Shard::open(&path)
}

const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]}}"#;

#[test]
fn a_good_file_is_read() {
    let shard = open(&file(GOOD, 34)).expect("valid");
    let start = LENGTH + GOOD.len() as u64;
    assert_eq!(shard.metadata["format"], "pt");
    assert_eq!(
        shard.tensors[1],
        Stored { name: "b".into(), dtype: safetensors::Dtype::BF16, shape: vec![5], range: start + 24..start + 34 }
    );
    let mut bytes = [0; 10];
    shard.read_at(&mut bytes, start + 24).expect("inside");
    assert_eq!(bytes, [1; 10]);
    assert!(open(&file("{}", 0)).expect("valid").tensors.is_empty());
}

#[test]
fn every_kind_of_damage_has_its_message() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F16","shape":[2],"data_offsets":{first}}},"b":{{"dtype":"F16","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    let huge = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    let long = [&1000u64.to_le_bytes()[..], b"{}"].concat();
    let not_utf8 = [&4u64.to_le_bytes()[..], b"{\"\xff\"", &[0; 9]].concat();
    for (bytes, part) in [
        (vec![], "0 bytes, and the header's length alone takes 8"),
        (vec![1; 7], "7 bytes"),
        (huge, "announces a header of 18446744073709551615 bytes, more than 100000000"),
        (long, "truncated: the header has 1000 bytes, but only 2 follow"),
        (not_utf8, "not UTF-8 at byte 2"),
        (file("[]", 0), "the header is not valid"),
        (file("{} {}", 0), "the header is not valid"),
        (file(r#"{"a":3}"#, 0), "the header is not valid"),
        (file(&one("Q4", "[2]", "[0,4]"), 4), "unknown variant `Q4`"),
        (file(&one("F16", "[-2]", "[0,4]"), 4), "the header is not valid"),
        (file(&one("F16", "[2]", "[0,5]"), 5), "tensor a: F16 [2] does not fill bytes 0 to 5 exactly"),
        (file(&one("F16", "[2]", "[4,0]"), 4), "does not fill bytes 4 to 0"),
        (file(&one("F16", "[4294967296,4294967296]", "[0,0]"), 0), "does not fill bytes 0 to 0"),
        (file(&one("F64", "[2305843009213693952]", "[0,0]"), 0), "does not fill bytes 0 to 0"),
        (file(&one("F16", "[2]", "[0,4]"), 3), "truncated: tensor a ends at byte 4 of the data, which has 3"),
        (file(&one("F16", "[2]", "[0,4]"), 9), "the tensors end at byte 4 of the data, which has 9"),
        (file(&one("F16", "[2]", "[2,6]"), 6), "leaves a hole before it, which ends at 0"),
        (file(&two("[0,4]", "[2,6]"), 6), "overlaps the tensor before it, which ends at 4"),
        (file(&two("[0,4]", "[0,4]"), 4), "overlaps the tensor before it"),
        (file(&two("[0,4]", "[6,10]"), 10), "leaves a hole"),
        (file(&two("[0,4]", "[4,8]").replace("\"b\"", "\"a\""), 8), "tensor a is described twice"),
    ] {
        let error = open(&bytes).expect_err(part).to_string();
        assert!(error.contains(part), "{part:?} is not in {error:?}");
        assert!(error.contains("model.safetensors: "), "{error}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    assert!(matches!(Shard::open(folder.path()), Err(Error::Format { .. })));
    assert!(matches!(Shard::open(&folder.path().join("none")), Err(Error::Io { .. })));
}

#[test]
fn views_begin_at_multiples_of_64() {
    let header = format!("{GOOD}{}", " ".repeat((LENGTH as usize + GOOD.len()).next_multiple_of(64) - GOOD.len() - 8));
    let shard = open(&file(&header, 34)).expect("valid");
    let [a, b] = [0, 1].map(|i| shard.place(&shard.tensors[i].range).expect("whole"));
    let a = a.expect("aligned");
    let mut bytes = [0; 24];
    a.file.read_exact_at(&mut bytes, a.range.start).expect("readable");
    assert_eq!((bytes, a.range.end - a.range.start), ([1; 24], 24));
    assert!(b.is_none());
}

/// Whether the safetensors library takes the file.
fn reference(bytes: &[u8]) -> bool {
    SafeTensors::deserialize(bytes).is_ok()
}

/// Headers that are nearly right: a few tensors with offsets and shapes from small numbers.
fn header() -> impl Strategy<Value = String> {
    let dtype = prop::sample::select(vec!["F16", "F32", "BF16", "U8", "F4", "F6_E2M3"]);
    let tensor = (dtype, prop::collection::vec(0usize..4, 0..3), 0usize..24, 0usize..24).prop_map(
        |(dtype, shape, first, len)| {
            format!(r#"{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{first},{}]}}"#, first + len)
        },
    );
    prop::collection::vec(tensor, 0..4).prop_map(|tensors| {
        format!(
            "{{{}}}",
            tensors.iter().enumerate().map(|(i, t)| format!("\"t{i}\":{t}")).collect::<Vec<_>>().join(",")
        )
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert_eq!(open(&bytes).is_ok(), reference(&bytes));
    }

    #[test]
    fn arbitrary_text_as_header_never_panics(text in ".{0,60}", data in 0usize..8) {
        let bytes = file(&text, data);
        prop_assert_eq!(open(&bytes).is_ok(), reference(&bytes));
    }

    #[test]
    fn a_header_is_taken_where_the_library_takes_it(header in header(), data in 0usize..40) {
        let bytes = file(&header, data);
        prop_assert_eq!(open(&bytes).is_ok(), reference(&bytes), "{}", header);
    }

    #[test]
    fn a_changed_byte_never_panics(place in 0..GOOD.len() + 8, value in any::<u8>(), cut in 0usize..40) {
        let mut bytes = file(GOOD, 34);
        bytes[place] = value;
        bytes.truncate(bytes.len() - cut.saturating_sub(20));
        if let Ok(shard) = open(&bytes) {
            for stored in &shard.tensors {
                prop_assert!(stored.range.end <= bytes.len() as u64);
            }
        }
    }
}

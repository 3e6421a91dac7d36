//! What devices can do, from what their makers publish, and how long a step takes on them at least.
//!
//! Figures are those of one *device* as PJRT counts them: a whole chip, except TPU7x, whose two halves are a device each.
//!
//! Sources. TPU memory, bandwidth, peaks and links: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x" of
//! Google's Cloud TPU documentation (November 2026). TPU clocks: the peak of bf16 divided by what the matrix units do in a
//! cycle, 2 · width² each (v4 and v5p 8 units of 128, v5e 4 of 128, v6e 4 of 256, TPU7x 4 of 256 in each half). f32 on TPU: products in
//! six passes of bf16. NVIDIA: data sheets of H100 SXM, H200 SXM and HGX B200, dense figures (half of those "with
//! sparsity"), f32 without TF32. Links are the sum of a device's, in one direction.

use xla::DType;

/// What one kind of device can do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chip {
    /// The name in a target: `v5e`, `h200`.
    pub name: &'static str,
    /// What the plugin calls a device of this kind.
    pub kind: &'static str,
    /// PJRT devices in a package: 2 where each half of a chip is one.
    pub devices: usize,
    /// Memory of a device in bytes, by its name plate; programs can use a little less.
    pub hbm_bytes: u64,
    /// Bytes per second between that memory and the chip.
    pub hbm_bandwidth: f64,
    /// Operations per second of products.
    pub peak: Peak,
    /// Cycles per second, where the compiler's estimates are in cycles.
    pub clock: Option<f64>,
    /// Bytes per second to other devices.
    pub links: f64,
}

/// Operations per second of products by operand type; a multiplication and an addition are two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// float32, as exactly as that type asks for.
    pub f32: f64,
    /// bfloat16 and float16.
    pub bf16: f64,
    /// Either float8; that of bf16 where there is no unit for it.
    pub fp8: f64,
    /// int8; that of bf16 where there is no unit for it.
    pub int8: f64,
}

impl Peak {
    /// For operands of this type.
    pub fn of(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 | DType::F64 => self.f32,
            DType::I8 | DType::U8 => self.int8,
            DType::F8E4M3FN | DType::F8E5M2 => self.fp8,
            _ => self.bf16,
        }
    }
}

const TERA: f64 = 1e12;
const GIGA: f64 = 1e9;
const GIB: u64 = 1 << 30;

/// The peaks of a TPU from that of bf16, fp8 and int8, in tera-operations per second.
const fn tpu(bf16: f64, fp8: f64, int8: f64) -> Peak {
    Peak { f32: bf16 * TERA / 6.0, bf16: bf16 * TERA, fp8: fp8 * TERA, int8: int8 * TERA }
}

/// Every kind whose figures are known, TPUs first, older before newer.
#[rustfmt::skip]
pub const CHIPS: &[Chip] = &[
    Chip { name: "v4", kind: "TPU v4", devices: 1, hbm_bytes: 32 * GIB, hbm_bandwidth: 1228.0 * GIGA,
           peak: tpu(275.0, 275.0, 275.0), clock: Some(1.05 * GIGA), links: 300.0 * GIGA },
    Chip { name: "v5e", kind: "TPU v5 lite", devices: 1, hbm_bytes: 16 * GIB, hbm_bandwidth: 819.0 * GIGA,
           peak: tpu(197.0, 197.0, 393.0), clock: Some(1.5 * GIGA), links: 200.0 * GIGA },
    Chip { name: "v5p", kind: "TPU v5", devices: 1, hbm_bytes: 95 * GIB, hbm_bandwidth: 2765.0 * GIGA,
           peak: tpu(459.0, 459.0, 918.0), clock: Some(1.75 * GIGA), links: 600.0 * GIGA },
    Chip { name: "v6e", kind: "TPU v6 lite", devices: 1, hbm_bytes: 32 * GIB, hbm_bandwidth: 1640.0 * GIGA,
           peak: tpu(918.0, 918.0, 1836.0), clock: Some(1.75 * GIGA), links: 400.0 * GIGA },
    Chip { name: "tpu7x", kind: "TPU7x", devices: 2, hbm_bytes: 96 * GIB, hbm_bandwidth: 3690.0 * GIGA,
           peak: tpu(1153.5, 2307.0, 1153.5), clock: Some(2.2 * GIGA), links: 300.0 * GIGA },
    Chip { name: "h100", kind: "NVIDIA H100 80GB HBM3", devices: 1, hbm_bytes: 80_000_000_000, hbm_bandwidth: 3350.0 * GIGA,
           peak: Peak { f32: 67.0 * TERA, bf16: 989.0 * TERA, fp8: 1979.0 * TERA, int8: 1979.0 * TERA },
           clock: None, links: 450.0 * GIGA },
    Chip { name: "h200", kind: "NVIDIA H200", devices: 1, hbm_bytes: 141_000_000_000, hbm_bandwidth: 4800.0 * GIGA,
           peak: Peak { f32: 67.0 * TERA, bf16: 989.0 * TERA, fp8: 1979.0 * TERA, int8: 1979.0 * TERA },
           clock: None, links: 450.0 * GIGA },
    Chip { name: "b200", kind: "NVIDIA B200", devices: 1, hbm_bytes: 180_000_000_000, hbm_bandwidth: 7700.0 * GIGA,
           peak: Peak { f32: 75.0 * TERA, bf16: 2250.0 * TERA, fp8: 4500.0 * TERA, int8: 4500.0 * TERA },
           clock: None, links: 900.0 * GIGA },
];

/// The chip that a target calls `name`.
pub fn named(name: &str) -> Option<&'static Chip> {
    CHIPS.iter().find(|chip| chip.name.eq_ignore_ascii_case(name))
}

/// What one run of a program does on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of memory that must be read.
    pub hbm_bytes: f64,
    /// Operations of the model's products.
    pub flops: f64,
    /// Bytes that must leave for other devices.
    pub link_bytes: f64,
    /// The compiler's estimate of its computations, where it makes one.
    pub cycles: Option<f64>,
}

/// The least time that each part of a device needs for some [`Work`], in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floors {
    /// To read memory.
    pub hbm: f64,
    /// To multiply.
    pub flops: f64,
    /// To send; latency is not in it.
    pub links: f64,
    /// To compute what the compiler made of the program, by its own estimate.
    pub cycles: Option<f64>,
}

impl Chip {
    /// The floors of `work` with operands of `dtype`.
    pub fn floors(&self, work: &Work, dtype: DType) -> Floors {
        Floors {
            hbm: work.hbm_bytes / self.hbm_bandwidth,
            flops: work.flops / self.peak.of(dtype),
            links: work.link_bytes / self.links,
            cycles: work.cycles.zip(self.clock).map(|(cycles, clock)| cycles / clock),
        }
    }
}

impl Floors {
    /// Seconds if every part works at its best all the time.
    pub fn roofline(&self) -> f64 {
        self.hbm.max(self.flops).max(self.links)
    }

    /// Seconds by the compiler's estimate, which leaves out the reads that go on beside the computation, and the links.
    pub fn estimate(&self) -> Option<f64> {
        self.cycles.map(|cycles| cycles.max(self.roofline()))
    }

    /// Which part the roofline is waiting for.
    pub fn bound(&self) -> &'static str {
        match self.roofline() {
            top if top == self.hbm => "memory",
            top if top == self.flops => "products",
            _ => "links",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chip(name: &str) -> &'static Chip {
        named(name).unwrap_or_else(|| panic!("{name}"))
    }

    #[test]
    fn decode_of_llama_2_7b_on_eight_v5e_has_the_floor_that_is_known() {
        // 1.69 GB of weights and 1.07 GB of cache on each of 8 devices; 819 GB/s at 1.5 GHz: 5.05 M cycles.
        let work = Work { hbm_bytes: 2.76e9, flops: 8.0 * 2.0 * 6.6e9 / 8.0, link_bytes: 8e6, cycles: Some(4.76e6) };
        let floors = chip("v5e").floors(&work, DType::BF16);
        let cycles = floors.hbm * 1.5e9;
        assert!((5.05e6..5.06e6).contains(&cycles), "{cycles}");
        assert_eq!((floors.roofline(), floors.bound()), (floors.hbm, "memory"));
        // The computation hides behind the reads, and does not where it is longer.
        assert_eq!(floors.estimate(), Some(floors.hbm));
        let slower = chip("v5e").floors(&Work { cycles: Some(9.6e6), ..work }, DType::BF16);
        assert!((slower.estimate().expect("cycles") - 6.4e-3).abs() < 1e-9);
    }

    #[test]
    fn a_prefill_waits_for_products_and_a_gather_of_weights_for_links() {
        let prefill = Work { hbm_bytes: 2e9, flops: 2.0 * 7.5e9 * 2048.0 / 8.0, link_bytes: 1e6, cycles: None };
        let floors = chip("v6e").floors(&prefill, DType::BF16);
        assert_eq!((floors.bound(), floors.estimate()), ("products", None));
        assert!((floors.flops * 1.75e9 / 7.3e6 - 1.0).abs() < 0.01);
        assert_eq!(chip("h100").floors(&Work { link_bytes: 1e12, ..prefill }, DType::BF16).bound(), "links");
    }

    #[test]
    fn peaks_follow_the_clock_and_the_matrix_units() {
        for (name, units, width) in
            [("v4", 8, 128), ("v5e", 4, 128), ("v5p", 8, 128), ("v6e", 4, 256), ("tpu7x", 4, 256)]
        {
            let chip = chip(name);
            let peak = f64::from(units * 2 * width * width) * chip.clock.expect("a TPU has one");
            assert!((peak / chip.peak.bf16 - 1.0).abs() < 0.005, "{name}: {peak}");
        }
    }

    #[test]
    fn narrow_types_have_peaks_of_their_own() {
        let peak = chip("h200").peak;
        assert_eq!([peak.of(DType::F16), peak.of(DType::I8)], [peak.bf16, peak.int8]);
        assert!(peak.of(DType::F32) < peak.bf16 && peak.fp8 > peak.bf16);
        assert!(named("v9z").is_none() && named("V5E").is_some());
    }
}

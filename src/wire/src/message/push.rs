//! What is pushed: files of a slice, and how that ends. PROTOCOL.md, section 9.

use dim_core::blocks::BlockRange;
use dim_core::digest::Sha;

use super::Kind;
use crate::codec::{Malformed, Reader, Writer};
use crate::layout::{HEADER, MAX_ITEMS, MAX_NAME};

/// Which file of a slice's directory an item of a push is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum ItemKind {
    Manifest = 1,
    PackageManifest = 2,
    PackageModel = 3,
    PackageWeights = 4,
    SelfTest = 5,
    GgufSlice = 16,
}

impl ItemKind {
    fn from_u8(kind: u8) -> Result<ItemKind, Malformed> {
        match kind {
            1 => Ok(ItemKind::Manifest),
            2 => Ok(ItemKind::PackageManifest),
            3 => Ok(ItemKind::PackageModel),
            4 => Ok(ItemKind::PackageWeights),
            5 => Ok(ItemKind::SelfTest),
            16 => Ok(ItemKind::GgufSlice),
            other => Err(Malformed::BadValue { field: "item kind", value: other.into() }),
        }
    }
}

/// A file of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which file.
    pub kind: ItemKind,
    /// Of which package.
    pub index: u8,
    /// Its size in bytes, at least 1, at most 2^40.
    pub size: u64,
    /// Its SHA-256.
    pub sha256: Sha,
}

/// A list of files to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushOffer {
    /// Identity of the model that the slice is from.
    pub model: Sha,
    /// Identity of the slice.
    pub slice: Sha,
    /// The blocks of the slice, as the host says them: a list that [is valid](PushOffer::is_valid) has at least one.
    pub blocks: BlockRange,
    /// The files, sorted by kind and index.
    pub items: Vec<Item>,
    /// The host's name.
    pub name: String,
}

impl PushOffer {
    /// What the worker knows this push by, from one connection to the next.
    pub fn id(&self) -> Sha {
        let mut bytes = Vec::new();
        self.encode_known(&mut Writer::new(&mut bytes));
        Sha::of(&bytes)
    }

    /// Whether the list keeps the rules of section 9.
    pub fn is_valid(&self) -> bool {
        let place = |i: &Item| (i.kind, i.index);
        (1..=MAX_ITEMS).contains(&self.items.len())
            && self.items.windows(2).all(|w| place(&w[0]) < place(&w[1]))
            && self.items.iter().all(|i| (1..=1 << 40).contains(&i.size))
            && self.blocks.first <= self.blocks.last
    }

    /// What stands behind PUSH_OFFER's header; `n_items` stands in it.
    pub(super) fn decode(r: &mut Reader<'_>, n_items: u16) -> Result<PushOffer, Malformed> {
        if !(1..=MAX_ITEMS).contains(&usize::from(n_items)) {
            return Err(Malformed::BadValue { field: "items", value: n_items.into() });
        }
        let (model, slice) = (Sha(r.array()?), Sha(r.array()?));
        let blocks = BlockRange { first: r.u32()?, last: r.u32()? };
        let mut items = Vec::with_capacity(usize::from(n_items));
        for _ in 0..n_items {
            let kind = ItemKind::from_u8(r.u8()?)?;
            let index = r.u8()?;
            r.zeros(6)?;
            items.push(Item { kind, index, size: r.u64()?, sha256: Sha(r.array()?) });
        }
        Ok(PushOffer { model, slice, blocks, items, name: r.string(MAX_NAME)? })
    }

    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        self.encode_known(w);
        w.string(&self.name, MAX_NAME);
    }

    /// All but the name: what the push id is the digest of.
    fn encode_known(&self, w: &mut Writer<'_>) {
        w.bytes(&self.model.0).bytes(&self.slice.0).u32(self.blocks.first).u32(self.blocks.last);
        for item in &self.items {
            w.u8(item.kind as u8).u8(item.index).zeros(6).u64(item.size).bytes(&item.sha256.0);
        }
    }
}

/// How a push, or an item of it, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PushOutcome {
    /// Complete and verified.
    Stored = 0,
    /// The bytes are not those of the offer; they have been dropped.
    HashDiffers = 1,
    /// The worker could not store them.
    StoringFailed = 2,
}

impl PushOutcome {
    pub(super) fn from_u8(outcome: u8) -> Result<PushOutcome, Malformed> {
        match outcome {
            0 => Ok(PushOutcome::Stored),
            1 => Ok(PushOutcome::HashDiffers),
            2 => Ok(PushOutcome::StoringFailed),
            other => Err(Malformed::BadValue { field: "outcome", value: other.into() }),
        }
    }
}

/// Appends what comes before the bytes of a file in a PUSH_DATA. The bytes follow as they are.
///
/// # Panics
/// If there are more than 4 GiB of them: [`crate::connection`] has refused them before.
pub fn encode_push_data_head(out: &mut Vec<u8>, item: u16, offset: u64, bytes: usize) {
    let length = u32::try_from(HEADER + 8 + bytes).expect("a piece has at most MAX_PUSH_DATA bytes");
    Writer::new(out).u8(Kind::PushData as u8).u8(0).u16(item).u32(length).u64(offset);
}

//! What the Noise library computes with: ring, and a curve that refuses worthless keys and counts its work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver, RingResolver};
use snow::types::{Cipher, Dh, Hash, Random};

/// ring's cipher, hash and random numbers; snow's default curve (ring's cannot be used with a key that is
/// kept), wrapped.
pub(super) struct Resolver {
    pub(super) curve_work: Arc<AtomicU32>,
}

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        RingResolver.resolve_rng()
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let curve = DefaultResolver.resolve_dh(choice)?;
        Some(Box::new(Contributory { curve, curve_work: self.curve_work.clone() }))
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        RingResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        RingResolver.resolve_cipher(choice)
    }
}

/// A curve that refuses a shared secret of zeros: then the peer's key was one of the few points that make the
/// secret independent of ours.
struct Contributory {
    curve: Box<dyn Dh>,
    curve_work: Arc<AtomicU32>,
}

impl Contributory {
    fn worked(&self) {
        self.curve_work.fetch_add(1, Ordering::Relaxed);
    }
}

impl Dh for Contributory {
    fn name(&self) -> &'static str {
        self.curve.name()
    }

    fn pub_len(&self) -> usize {
        self.curve.pub_len()
    }

    fn priv_len(&self) -> usize {
        self.curve.priv_len()
    }

    fn set(&mut self, privkey: &[u8]) {
        self.worked();
        self.curve.set(privkey);
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        self.worked();
        self.curve.generate(rng)
    }

    fn pubkey(&self) -> &[u8] {
        self.curve.pubkey()
    }

    fn privkey(&self) -> &[u8] {
        self.curve.privkey()
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        self.worked();
        self.curve.dh(pubkey, out)?;
        let shared = &out[..self.curve.pub_len().min(out.len())];
        // every byte is looked at, whatever they are
        match shared.iter().fold(0, |all, b| all | b) {
            0 => Err(snow::Error::Dh),
            _ => Ok(()),
        }
    }
}

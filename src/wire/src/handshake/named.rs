//! How a host names its key to a worker in clear: otherwise each time, so that who listens, or who only pretends to be
//! the worker, learns nothing by which it would know the host again.

use ring::hmac;

use super::{NONCE, Purpose, SALT};
use crate::keys::Key;

/// A key as a host names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// What the key is.
    pub purpose: Purpose,
    /// The name: zeros in pairing.
    pub mark: [u8; 8],
    /// The host's salt: zeros in pairing.
    pub salt: [u8; SALT],
    /// The worker's nonce.
    pub nonce: [u8; NONCE],
}

impl Named {
    /// Whether it is this one. All bytes are looked at, whatever they are.
    pub fn is(&self, key: &Key) -> bool {
        let mark = self.mark_of(key);
        mark.iter().zip(self.mark).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
    }

    /// What names a key with this nonce and this salt.
    pub fn mark_of(&self, key: &Key) -> [u8; 8] {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key.bytes()));
        context.update(b"dim key mark v2");
        context.update(&self.nonce);
        context.update(&self.salt);
        let mut mark = [0; 8];
        mark.copy_from_slice(&context.sign().as_ref()[..8]);
        mark
    }
}

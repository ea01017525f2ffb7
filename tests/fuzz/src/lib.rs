//! The product's protocol modules, without the rest of the product.
#![forbid(unsafe_code)]

#[path = "../../../src/keys.rs"]
pub mod keys;
#[path = "../../../src/wire/mod.rs"]
pub mod wire;

//! What a tensor's name says.

/// The block a tensor belongs to, by its name: `blk.7.attn_q.weight` to 7.
pub fn block_of(name: &str) -> Option<u32> {
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    // as ggml writes it: no sign, no leading zero
    if number.is_empty()
        || number.len() > 1 && number.starts_with('0')
        || !number.bytes().all(|b| b.is_ascii_digit())
    {
        return None;
    }
    Some(number.parse().unwrap_or(u32::MAX))
}

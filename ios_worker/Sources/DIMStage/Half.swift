// IEEE half precision as bit patterns. Packages take and give fp16; on the wire rows may be F16 or F32. Bits are
// what is stored and moved; only what must be computed with becomes a Float.

/// The bits of one fp16 value.
public typealias Half = UInt16

/// The value of fp16 bits.
@inline(__always)
public func float(_ half: Half) -> Float {
    #if os(macOS) && arch(x86_64)
        // Swift has no Float16 there
        let sign = UInt32(half & 0x8000) << 16
        let exponent = UInt32(half >> 10) & 0x1F
        let fraction = UInt32(half & 0x3FF)
        switch exponent {
        case 0: return (sign == 0 ? 1 : -1) * Float(fraction) * 0x1p-24
        case 31: return Float(bitPattern: sign | 0x7F80_0000 | fraction << 13)
        default: return Float(bitPattern: sign | (exponent + 112) << 23 | fraction << 13)
        }
    #else
        return Float(Float16(bitPattern: half))
    #endif
}

/// The fp16 bits nearest to `value`, ties to even; infinite where it is too large.
@inline(__always)
public func half(_ value: Float) -> Half {
    #if os(macOS) && arch(x86_64)
        let bits = value.bitPattern
        let sign = Half(truncatingIfNeeded: bits >> 16) & 0x8000
        let magnitude = bits & 0x7FFF_FFFF
        if magnitude > 0x7F80_0000 { return sign | 0x7E00 }
        if magnitude >= 0x477F_F000 { return sign | 0x7C00 }
        if magnitude < 0x3880_0000 {
            // below the least normal: let an addition of 0.5 do the rounding
            let rounded = Float(bitPattern: magnitude) + 0.5
            return sign | Half(truncatingIfNeeded: rounded.bitPattern &- Float(0.5).bitPattern)
        }
        let rounded = magnitude &+ 0xFFF &+ ((magnitude >> 13) & 1)
        return sign | Half(truncatingIfNeeded: (rounded &- 0x3800_0000) >> 13)
    #else
        return Float16(value).bitPattern
    #endif
}

/// Largest finite fp16 value.
public let halfMax: Float = 65_504

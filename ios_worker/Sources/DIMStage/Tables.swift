// cos, sin and mask of every position, made once. A row of the mask is a window on one strip of zeros and then
// mask values; rows of cos and sin lie one after the other: so the inputs of a decode step are pointers into the tables.
import Foundation

final class Tables {
    let nCtx: Int
    let headDim: Int
    private let cosines: UnsafeMutableBufferPointer<Half>  // (n_ctx, head_dim)
    private let sines: UnsafeMutableBufferPointer<Half>  // (n_ctx, head_dim)
    private let strip: UnsafeMutableBufferPointer<Half>  // (2 n_ctx): zeros, then mask values

    init(nCtx: Int, headDim: Int, inverseFrequencies: [Double], magnitude: Double, maskValue: Double) {
        self.nCtx = nCtx
        self.headDim = headDim
        cosines = .allocate(capacity: nCtx * headDim)
        sines = .allocate(capacity: nCtx * headDim)
        strip = .allocate(capacity: 2 * nCtx)
        for position in 0..<nCtx {
            for (index, frequency) in inverseFrequencies.enumerated() {
                // in double, rounded once
                let angle = Double(position) * frequency
                let place = position * headDim + index
                cosines[place] = half(rounding: magnitude * cos(angle))
                sines[place] = half(rounding: magnitude * sin(angle))
                cosines[place + headDim / 2] = cosines[place]
                sines[place + headDim / 2] = sines[place]
            }
        }
        strip[..<nCtx].initialize(repeating: half(0))
        strip[nCtx...].initialize(repeating: half(Float(maskValue)))
    }

    deinit {
        cosines.deallocate()
        sines.deallocate()
        strip.deallocate()
    }

    func cosine(from position: Int, rows: Int) -> UnsafeBufferPointer<Half> {
        UnsafeBufferPointer(rebasing: cosines[position * headDim..<(position + rows) * headDim])
    }

    func sine(from position: Int, rows: Int) -> UnsafeBufferPointer<Half> {
        UnsafeBufferPointer(rebasing: sines[position * headDim..<(position + rows) * headDim])
    }

    /// The mask of the row at `position`: 0 at columns up to it.
    func maskRow(_ position: Int) -> UnsafeBufferPointer<Half> {
        UnsafeBufferPointer(rebasing: strip[nCtx - 1 - position..<2 * nCtx - 1 - position])
    }
}

/// fp16 nearest to a double, rounded once: a float between would round twice.
private func half(rounding value: Double) -> Half {
    #if os(macOS) && arch(x86_64)
        // round to odd on the way: the second rounding then sees every tie as it is
        var step = Float(value)
        if Double(step) != value {
            if abs(Double(step)) > abs(value) { step = step > 0 ? step.nextDown : step.nextUp }
            step = Float(bitPattern: step.bitPattern | 1)
        }
        return half(step)
    #else
        return Float16(value).bitPattern
    #endif
}

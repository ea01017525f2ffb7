// A stage made of packages in a chain: `hidden_out` of one is `hidden` of the next. Per span of a step:
//
//     rows of the wire -> fp16, times residual_scale
//     chunk: n_prefill rows at once while they fit the context and are worth it, else one
//     each package in turn
//     fp16 -> rows of the wire, divided by residual_scale; every value finite
//
// Which rows go through `prefill` depends on positions and counts only, so a replay with the same steps repeats the same
// calls and leaves the same cache.
import DIMWire

public final class PackagedStage: Stage, @unchecked Sendable {
    public struct Parameters {
        public var headDim: Int
        public var nPrefill: Int
        /// (head_dim / 2)
        public var inverseFrequencies: [Double]
        public var magnitude: Double = 1
        public var maskValue: Double = -10_000
        public var residualScale: Double = 1
        /// fewer rows than this go one by one: a `prefill` call costs about as much whatever its real rows
        public var prefillFrom = 2

        public init(headDim: Int, nPrefill: Int, inverseFrequencies: [Double]) {
            self.headDim = headDim
            self.nPrefill = nPrefill
            self.inverseFrequencies = inverseFrequencies
        }

        public init(_ manifest: Manifest) {
            self.init(
                headDim: manifest.dims.headDim, nPrefill: manifest.nPrefill, inverseFrequencies: manifest.rope.invFreq)
            magnitude = manifest.rope.magnitude
            maskValue = manifest.maskValue
            residualScale = manifest.residualScale
        }
    }

    public let shape: StageShape
    private let parameters: Parameters
    private let packages: [any Package]
    private let tables: Tables
    private let scale: Float
    /// per session, per package
    private var states: [Int: [any PackageState]] = [:]
    /// hidden of a chunk, before and after a package
    private var current: UnsafeMutableBufferPointer<Half>  // (n_prefill, n_embd)
    private var next: UnsafeMutableBufferPointer<Half>  // (n_prefill, n_embd)
    private let mask: UnsafeMutableBufferPointer<Half>  // (n_prefill, n_ctx)

    public init(shape: StageShape, parameters: Parameters, packages: [any Package]) {
        precondition(!packages.isEmpty && parameters.nPrefill >= 1)
        self.shape = shape
        self.parameters = parameters
        self.packages = packages
        scale = Float(parameters.residualScale)
        tables = Tables(
            nCtx: shape.nCtx, headDim: parameters.headDim, inverseFrequencies: parameters.inverseFrequencies,
            magnitude: parameters.magnitude, maskValue: parameters.maskValue)
        current = .allocate(capacity: parameters.nPrefill * shape.nEmbd)
        next = .allocate(capacity: parameters.nPrefill * shape.nEmbd)
        mask = .allocate(capacity: parameters.nPrefill * shape.nCtx)
    }

    deinit {
        current.deallocate()
        next.deallocate()
        mask.deallocate()
    }

    // Caches stay where they are: a session that begins again writes over them, and the mask hides the rest.
    public func reset() {}
    public func rewind(session: UInt32, position: UInt32) {}
    public func end(session: UInt32) {}

    public func evaluate(_ step: Step, into output: UnsafeMutableRawBufferPointer) throws(StageError) {
        var row = 0
        for span in step.spans {
            var done = 0
            while done < Int(span.count) {
                let position = Int(span.position) + done
                let real = chunk(left: Int(span.count) - done, position: position)
                try load(step.rows, from: row + done, count: real)
                try evaluate(session: Int(span.session), position: position, real: real)
                try store(step.rows.format, count: real, to: output, at: row + done)
                done += real
            }
            row += Int(span.count)
        }
    }

    /// How many of `left` rows go into one call.
    private func chunk(left: Int, position: Int) -> Int {
        let fits = position + parameters.nPrefill <= shape.nCtx
        return fits && left >= parameters.prefillFrom && parameters.nPrefill > 1 ? min(left, parameters.nPrefill) : 1
    }

    /// `real` rows in `current` through every package.
    private func evaluate(session: Int, position: Int, real: Int) throws(StageError) {
        let states = try self.states(of: session)
        let rows = real == 1 ? 1 : parameters.nPrefill
        let count = rows * shape.nEmbd
        // fill up with the last real row: a row of zeros has no norm
        for row in real..<max(real, rows) {
            let target = UnsafeMutableBufferPointer(rebasing: current[row * shape.nEmbd..<(row + 1) * shape.nEmbd])
            _ = target.update(from: current[(real - 1) * shape.nEmbd..<real * shape.nEmbd])
        }
        for (package, state) in zip(packages, states) {
            let inputs = PackageInputs(
                rows: rows, hidden: UnsafeBufferPointer(rebasing: current[..<count]), position: position,
                cos: tables.cosine(from: position, rows: rows), sin: tables.sine(from: position, rows: rows),
                mask: maskRows(position, rows))
            let result = UnsafeMutableBufferPointer(rebasing: next[..<count])
            try package.evaluate(rows == 1 ? .decode : .prefill, inputs, state: state, into: result)
            let bad = countNonFinite(
                UnsafeRawBufferPointer(UnsafeBufferPointer(rebasing: result[..<(real * shape.nEmbd)])), .f16)
            guard bad == 0 else {
                // one such row in a cache would spoil every later one
                self.states[session] = nil
                throw .nonFinite(
                    firstBlock: package.blocks.lowerBound, lastBlock: package.blocks.upperBound, count: bad)
            }
            swap(&current, &next)
        }
    }

    private func states(of session: Int) throws(StageError) -> [any PackageState] {
        if let states = states[session] { return states }
        var made: [any PackageState] = []
        for package in packages { made.append(try package.makeState()) }
        states[session] = made
        return made
    }

    private func maskRows(_ position: Int, _ rows: Int) -> UnsafeBufferPointer<Half> {
        if rows == 1 { return tables.maskRow(position) }
        for row in 0..<rows {
            let target = UnsafeMutableBufferPointer(rebasing: mask[row * shape.nCtx..<(row + 1) * shape.nCtx])
            _ = target.update(from: tables.maskRow(position + row))
        }
        return UnsafeBufferPointer(rebasing: mask[..<(rows * shape.nCtx)])
    }

    // MARK: rows of the wire

    private func load(_ rows: Rows, from first: Int, count: Int) throws(StageError) {
        let values = count * shape.nEmbd
        let width = rows.format.dtype.width
        let target = UnsafeMutableBufferPointer(rebasing: current[..<values])
        let tooLarge = rows.hidden.withUnsafeBytes { whole in
            let source = UnsafeRawBufferPointer(
                rebasing: whole[first * shape.nEmbd * width..<(first * shape.nEmbd + values) * width])
            if rows.format.dtype == .f16, scale == 1 {
                UnsafeMutableRawBufferPointer(target).copyMemory(from: source)
                return 0
            }
            var tooLarge = 0
            for index in 0..<values {
                let value = scale * element(source, index, rows.format.dtype)
                target[index] = half(value)
                // what rounds up to infinity is too large as well
                if target[index] & 0x7C00 == 0x7C00 { tooLarge += 1 }
            }
            return tooLarge
        }
        guard tooLarge == 0 else { throw .overflow(block: shape.firstBlock, count: tooLarge) }
    }

    private func store(
        _ format: RowFormat, count: Int, to output: UnsafeMutableRawBufferPointer, at first: Int
    ) throws(StageError) {
        let values = count * shape.nEmbd
        let width = format.dtype.width
        let target = UnsafeMutableRawBufferPointer(
            rebasing: output[first * shape.nEmbd * width..<(first * shape.nEmbd + values) * width])
        if format.dtype == .f16, scale == 1 {
            target.copyMemory(from: UnsafeRawBufferPointer(UnsafeBufferPointer(rebasing: current[..<values])))
            return
        }
        var tooLarge = 0
        for index in 0..<values {
            let value = float(current[index]) / scale
            switch format.dtype {
            case .f16:
                let bits = half(value)
                if bits & 0x7C00 == 0x7C00 { tooLarge += 1 }
                target.storeBytes(of: bits.littleEndian, toByteOffset: 2 * index, as: UInt16.self)
            case .f32:
                target.storeBytes(of: value.bitPattern.littleEndian, toByteOffset: 4 * index, as: UInt32.self)
            }
        }
        guard tooLarge == 0 else { throw .overflow(block: shape.lastBlock, count: tooLarge) }
    }

    private func element(_ source: UnsafeRawBufferPointer, _ index: Int, _ dtype: DType) -> Float {
        switch dtype {
        case .f16: float(Half(littleEndian: source.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self)))
        case .f32:
            Float(
                bitPattern: UInt32(
                    littleEndian: source.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self)))
        }
    }
}

extension StageShape {
    /// What a directory of packages can serve.
    public init(_ manifest: Manifest) {
        self.init()
        arch = manifest.model.arch
        modelBlocks = manifest.model.nBlocks
        firstBlock = manifest.slice.firstBlock
        lastBlock = manifest.slice.lastBlock
        machine.engine = .coreML
        nEmbd = manifest.dims.nEmbd
        nCtx = manifest.nCtx
        dtypes = [.f16, .f32]
        model = digest(manifest.model.sha256)
        slice = digest(manifest.slice.sha256)
        parameters = manifest.model.paramsSha256.map(digest) ?? .unknown
    }
}

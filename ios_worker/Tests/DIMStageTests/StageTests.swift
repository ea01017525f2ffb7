// Chunks, padding, positions and row types of PackagedStage, with the fake packages whose answer depends on all of them.
import DIMWire
import Foundation
import Testing

@testable import DIMStage

@Suite struct StageTests {
    private func shape(_ nCtx: Int = 64, blocks: ClosedRange<Int> = 3...5) -> StageShape {
        var shape = StageShape()
        shape.modelBlocks = 8
        shape.firstBlock = blocks.lowerBound
        shape.lastBlock = blocks.upperBound
        shape.nEmbd = 12
        shape.nCtx = nCtx
        return shape
    }

    private func rows(_ count: Int, seed: Int, _ dtype: DType = .f16) -> Rows {
        var bytes: [UInt8] = []
        for index in 0..<count * 12 {
            // integers below 2048: the same values in every type
            let value = Float((index &* 37 &+ seed &* 101) % 200)
            switch dtype {
            case .f16: withUnsafeBytes(of: half(value).littleEndian) { bytes += $0 }
            case .f32: withUnsafeBytes(of: value.bitPattern.littleEndian) { bytes += $0 }
            }
        }
        return Rows(format: RowFormat(dtype), count: count, hidden: bytes[...])
    }

    private func evaluate(_ stage: PackagedStage, _ spans: [Span], _ rows: Rows) throws -> [UInt8] {
        var output = [UInt8](repeating: 0xEE, count: rows.hidden.count)
        try output.withUnsafeMutableBytes {
            try stage.evaluate(Step(id: 1, spans: spans, rows: rows), into: $0)
        }
        return output
    }

    private func slice(_ rows: Rows, _ range: Range<Int>) -> Rows {
        let width = 12 * rows.format.dtype.width
        let base = rows.hidden.startIndex
        return Rows(
            format: rows.format, count: range.count,
            hidden: Array(rows.hidden[base + range.lowerBound * width..<base + range.upperBound * width])[...])
    }

    @Test func everyWayToCutAPromptGivesTheSameRows() throws {
        var generator = SystemRandomNumberGenerator()
        let all = rows(64, seed: 1)
        // one by one, on a stage that knows no chunks
        let simple = PackagedStage.fake(shape: shape(), nPrefill: 1)
        var expected: [UInt8] = []
        for position in 0..<64 {
            expected += try evaluate(
                simple, [Span(session: 0, position: UInt32(position), count: 1)], slice(all, position..<position + 1))
        }
        for nPrefill in [2, 5, 16, 64] {
            let stage = PackagedStage.fake(shape: shape(), nPrefill: nPrefill)
            for session in 0..<3 {
                var found: [UInt8] = []
                var position = 0
                while position < 64 {
                    let count = Int.random(in: 1...min(40, 64 - position), using: &generator)
                    found += try evaluate(
                        stage, [Span(session: UInt32(session), position: UInt32(position), count: UInt32(count))],
                        slice(all, position..<position + count))
                    position += count
                }
                #expect(found == expected, "n_prefill \(nPrefill)")
            }
        }
    }

    @Test func chunksNeverReachPastTheContext() throws {
        let calls = Calls()
        let package = FakePackage(blocks: 3...3, nEmbd: 12, nCtx: 20)
        package.before = { function, inputs in calls.list.append((function, inputs.position, inputs.rows)) }
        var parameters = PackagedStage.Parameters(headDim: 2, nPrefill: 8, inverseFrequencies: [1])
        parameters.prefillFrom = 3
        let stage = PackagedStage(shape: shape(20, blocks: 3...3), parameters: parameters, packages: [package])
        _ = try evaluate(stage, [Span(session: 0, position: 0, count: 20)], rows(20, seed: 2))
        // 8 + 8 real rows, then 4 where 16 + 8 > 20: one by one
        #expect(calls.list.map(\.1) == [0, 8, 16, 17, 18, 19])
        #expect(calls.list.map(\.2) == [8, 8, 1, 1, 1, 1])
        calls.list = []
        // two rows are less than prefillFrom; five are padded
        _ = try evaluate(stage, [Span(session: 1, position: 0, count: 2)], rows(2, seed: 2))
        _ = try evaluate(stage, [Span(session: 1, position: 2, count: 5)], rows(5, seed: 2))
        #expect(calls.list.map(\.1) == [0, 1, 2])
        #expect(calls.list.map(\.0) == [.decode, .decode, .prefill])
    }

    @Test func paddingRepeatsTheLastRow() throws {
        let package = FakePackage(blocks: 3...3, nEmbd: 12, nCtx: 32)
        let seen = Calls()
        package.before = { _, inputs in seen.hidden.append(Array(inputs.hidden)) }
        let stage = PackagedStage(
            shape: shape(32, blocks: 3...3), parameters: .init(headDim: 2, nPrefill: 4, inverseFrequencies: [1]),
            packages: [package])
        _ = try evaluate(stage, [Span(session: 0, position: 0, count: 2)], rows(2, seed: 3))
        let hidden = seen.hidden[0]
        #expect(hidden.count == 48)
        #expect(hidden[12..<24] == hidden[24..<36])
        #expect(hidden[12..<24] == hidden[36..<48])
        #expect(hidden[0..<12] != hidden[12..<24])
    }

    @Test func rewindAndASecondLifeOfASessionGiveTheSameRows() throws {
        let stage = PackagedStage.fake(shape: shape())
        let all = rows(40, seed: 4)
        let first = try evaluate(stage, [Span(session: 0, position: 0, count: 40)], all)
        stage.rewind(session: 0, position: 10)
        // other rows there meanwhile
        _ = try evaluate(stage, [Span(session: 0, position: 10, count: 5)], rows(5, seed: 99))
        stage.rewind(session: 0, position: 10)
        let again = try evaluate(stage, [Span(session: 0, position: 10, count: 30)], slice(all, 10..<40))
        #expect(again == Array(first[(10 * 24)...]))
        stage.end(session: 0)
        stage.reset()
        #expect(try evaluate(stage, [Span(session: 0, position: 0, count: 40)], all) == first)
    }

    @Test func everyRowTypeCarriesTheSameValues() throws {
        func values(_ bytes: [UInt8], _ dtype: DType) -> [Float] {
            bytes.withUnsafeBytes { raw in
                (0..<bytes.count / dtype.width).map { index in
                    switch dtype {
                    case .f16: float(raw.loadUnaligned(fromByteOffset: 2 * index, as: UInt16.self))
                    case .f32: Float(bitPattern: raw.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self))
                    }
                }
            }
        }
        let span = Span(session: 0, position: 0, count: 20)
        let f16 = values(try evaluate(.fake(shape: shape()), [span], rows(20, seed: 5, .f16)), .f16)
        let f32 = values(try evaluate(.fake(shape: shape()), [span], rows(20, seed: 5, .f32)), .f32)
        #expect(f16 == f32)
    }

    @Test func theResidualScaleIsUndone() throws {
        // a package that gives what it gets: what comes out is what went in
        var parameters = PackagedStage.Parameters(headDim: 2, nPrefill: 4, inverseFrequencies: [1])
        parameters.residualScale = 0.25
        let echo = EchoPackage()
        let stage = PackagedStage(shape: shape(), parameters: parameters, packages: [echo])
        let sent = rows(3, seed: 6)
        #expect(try evaluate(stage, [Span(session: 0, position: 0, count: 3)], sent) == Array(sent.hidden))
        #expect(float(echo.first) == 0.25 * float(UInt16(sent.hidden[0]) | UInt16(sent.hidden[1]) << 8))
    }

    @Test func valuesTooLargeForFp16AreSaid() throws {
        var bytes: [UInt8] = []
        for value in [Float(65_504), 65_519, 65_520, 1e30, -1e6, 0, 1, 2, 3, 4, 5, 6] {
            withUnsafeBytes(of: value.bitPattern.littleEndian) { bytes += $0 }
        }
        let large = Rows(format: RowFormat(.f32), count: 1, hidden: bytes[...])
        #expect(throws: StageError.overflow(block: 3, count: 3)) {
            try evaluate(.fake(shape: shape()), [Span(session: 0, position: 0, count: 1)], large)
        }
        // with a scale that makes room they go in, and come out too large for F16
        var parameters = PackagedStage.Parameters(headDim: 2, nPrefill: 4, inverseFrequencies: [1])
        parameters.residualScale = 0.5
        let stage = PackagedStage(shape: shape(), parameters: parameters, packages: [EchoPackage(output: 0x7BFF)])
        #expect(throws: StageError.overflow(block: 5, count: 12)) {
            try evaluate(stage, [Span(session: 0, position: 0, count: 1)], rows(1, seed: 1))
        }
    }

    @Test func aSpoiledCacheIsThrownAway() throws {
        let echo = EchoPackage(output: 0x7C00)
        let stage = PackagedStage(
            shape: shape(), parameters: .init(headDim: 2, nPrefill: 4, inverseFrequencies: [1]), packages: [echo])
        for _ in 0..<2 {
            #expect(throws: StageError.nonFinite(firstBlock: 3, lastBlock: 5, count: 12)) {
                try evaluate(stage, [Span(session: 0, position: 0, count: 1)], rows(1, seed: 1))
            }
        }
        #expect(echo.statesMade == 2)
    }

    @Test func errorsSayBlockCountAndStep() {
        let reports: [(StageError, ErrorCode, UInt32?)] = [
            (.nonFinite(firstBlock: 11, lastBlock: 12, count: 3), .nonFinite, 11),
            (.overflow(block: 17, count: 1), .overflow, 17),
            (.noMemory("x"), .noMemory, nil), (.compute("y"), .compute, nil),
        ]
        for (error, code, block) in reports {
            let report = error.report(step: 9, worker: "a phone")
            #expect(report.code == code && report.block == block && report.step == 9)
        }
        #expect(
            reports[0].0.report(step: 1, worker: "a phone").text
                == "blocks 11..12 produced 3 values that are not finite on a phone (fp16)")
    }

    @Test func tablesAreThoseOfTheDocument() {
        let frequencies = [1, 0.1]
        let tables = Tables(nCtx: 10, headDim: 4, inverseFrequencies: frequencies, magnitude: 1.5, maskValue: -10_000)
        for position in 0..<10 {
            let cos = tables.cosine(from: position, rows: 1).map { float($0) }
            let sin = tables.sine(from: position, rows: 1).map { float($0) }
            for i in 0..<4 {
                let angle = Double(position) * frequencies[i % 2]
                #expect(abs(Double(cos[i]) - 1.5 * Foundation.cos(angle)) < 1e-3)
                #expect(abs(Double(sin[i]) - 1.5 * Foundation.sin(angle)) < 1e-3)
            }
            let mask = tables.maskRow(position).map { float($0) }
            #expect(mask.count == 10)
            for column in 0..<10 { #expect(mask[column] == (column <= position ? 0 : -10_000)) }
        }
        #expect(tables.cosine(from: 2, rows: 3).count == 12)
    }

    @Test func halfPrecisionIsExactBothWays() {
        for bits in UInt16.min ... .max {
            let value = float(bits)
            if value.isNaN { continue }
            #expect(half(value) == bits)
        }
        #expect(half(65_519) == 0x7BFF)
        #expect(half(65_520) == 0x7C00)
        #expect(half(0x1p-25) == 0)
    }
}

final class Calls: @unchecked Sendable {
    var list: [(PackageFunction, Int, Int)] = []
    var hidden: [[Half]] = []
}

/// Gives back what it gets, or one value everywhere.
private final class EchoPackage: Package {
    private final class State: PackageState {}
    let blocks = 3...5
    private let output: Half?
    var first: Half = 0
    var statesMade = 0

    init(output: Half? = nil) { self.output = output }

    func makeState() -> any PackageState {
        statesMade += 1
        return State()
    }

    func evaluate(
        _ function: PackageFunction, _ inputs: PackageInputs, state: any PackageState,
        into target: UnsafeMutableBufferPointer<Half>
    ) {
        first = inputs.hidden[0]
        for index in target.indices { target[index] = output ?? inputs.hidden[index] }
    }
}

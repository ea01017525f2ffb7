// What the screen shows, and that it is redrawn only where something has changed.
import DIMCoreML
import DIMCrypto
import DIMServer
import DIMStage
import Foundation
import Observation
import TestFixtures
import Testing

@testable import DIMPhone

@MainActor @Suite struct ScreenTests {
    private let meter = StepMeter()
    private var screen: Screen { Screen(name: "a phone", meter: meter) }

    /// Whether `change` redraws a view that reads `reads`.
    private func redraws(_ reads: () -> Void, after change: () -> Void) -> Bool {
        let changed = Locked(false)
        withObservationTracking(reads) { changed.withLock { $0 = true } }
        change()
        return changed.withLock { $0 }
    }

    @Test func aTickRedrawsOnlyWhatChanged() {
        let screen = screen
        var device = DeviceState()
        device.memory = 1 << 30
        screen.tick(device: device)
        // the whole of the screen, twice a second, with nothing new
        func everything() {
            _ = (screen.steps, screen.device, screen.name, screen.addresses, screen.problem, screen.packages)
        }
        #expect(!redraws(everything, after: { screen.tick(device: device) }))
        meter.add(rows: 1, microseconds: 100)
        #expect(
            !redraws({ _ = (screen.device, screen.addresses, screen.packages) }, after: { screen.tick(device: device) })
        )
        meter.add(rows: 1, microseconds: 100)
        #expect(redraws({ _ = screen.steps }, after: { screen.tick(device: device) }))
        device.memory = 1 << 29
        #expect(redraws({ _ = screen.device }, after: { screen.tick(device: device) }))
        #expect(!redraws({ _ = screen.addresses }, after: { screen.show(addresses: []) }))
    }

    @Test func theCommandThatPairsIsShownWhole() throws {
        let screen = screen
        #expect(screen.handle(.listening("[::]:7878")) == .announce)
        screen.show(addresses: ["192.168.1.7", "172.20.10.1"])
        let code = PairingCode.random().shown
        screen.show(code, until: .now)
        let command = try #require(screen.pairing?.command(screen.addresses.first))
        // dim-host pair ADDR:PORT CODE
        let words = command.split(separator: " ").map(String.init)
        try #require(words == ["dim-host", "pair", "192.168.1.7:7878", code])
        #expect(try PairingCode(typed: words[3]).shown == code)
        #expect(screen.pairing?.command(nil) == nil)
        // whoever was paired is named, and stays named when the code closes
        _ = screen.handle(.paired(host: "a desk"))
        _ = screen.handle(.pairingClosed)
        #expect(screen.paired == "a desk" && screen.pairing == nil)
    }

    @Test func theAddressesFollowTheNetwork() {
        let screen = screen
        _ = screen.handle(.listening("0.0.0.0:7979"))
        screen.show(addresses: [])
        #expect(screen.problem?.text.hasPrefix("No network") == true)
        screen.show(addresses: ["172.20.10.1"])
        #expect(screen.addresses == ["172.20.10.1:7979"] && screen.problem == nil)
        screen.show(addresses: ["192.168.1.7"])
        #expect(screen.addresses == ["192.168.1.7:7979"])
    }

    @Test func aLostListenerIsOpenedAgainAndNotForEver() {
        let screen = screen
        for _ in 0..<3 { #expect(screen.handle(.listenerLost) == .listen) }
        #expect(screen.handle(.listenerLost) == nil)
        #expect(screen.problem?.text.contains("listener") == true)
        screen.paused()
        #expect(screen.handle(.listenerLost) == .listen)
    }

    @Test func aFailedLoadStaysOnTheScreenWithAWayOut() throws {
        let screen = screen
        let fixture = try Fixture(seed: 51)
        screen.show(try Manifest.read(fixture.directory))
        #expect(screen.packages.map(\.blocks) == ["blocks 2..3", "blocks 4..4"])
        screen.show(.loading(.ane, package: 1, of: 2))
        #expect(screen.packages[1].state == "loading on the Neural Engine")
        screen.failed(StageError.compute("Core ML: ANECCompile() FAILED"))
        #expect(screen.problem?.canRetry == true)
        #expect(screen.problem?.text == "These packages cannot be used: the Neural Engine refused the program (11).")
        // a host that connects, for a push, does not make it good
        _ = screen.handle(.connected(host: "a desk", address: "x", connection: "y"))
        #expect(screen.problem?.canRetry == true)
        #expect(screen.handle(.pushed(fixture.directory)) == .load)
        screen.show(try Manifest.read(fixture.directory))
        #expect(screen.problem == nil)
        var figure = UnitFigure(unit: "ane", passes: true)
        figure.isElsewhere = true
        screen.ready(.ane, [figure])
        #expect(screen.packages.allSatisfy { $0.isReady && $0.state == "ready, not on the Neural Engine" })
    }

    @Test func pushesAndReasonsAreShown() {
        let screen = screen
        _ = screen.handle(.pushing(bytes: 1, of: 4))
        #expect(screen.receiving == 0.25)
        _ = screen.handle(.connected(host: "a desk", address: "x", connection: "y"))
        _ = screen.handle(.disconnected(host: "a desk", why: "blocks 2..3 produced 3 values", received: 0, sent: 0))
        #expect(screen.receiving == nil && screen.host == nil)
        #expect(screen.problem?.text == "blocks 2..3 produced 3 values.")
    }

    @Test func rowsAreCountedOverTheLastSeconds() {
        meter.add(rows: 64, microseconds: 64_000, now: 1000)
        meter.add(rows: 1, microseconds: 100_000, now: 1100)
        meter.add(rows: 1, microseconds: 100_000, now: 1200)
        let reading = meter.reading(now: 1200)
        #expect(reading.rows == 66)
        #expect(reading.rowsPerSecond == 10)
        #expect(abs(reading.millisecondsPerStep - 88) < 1e-9)
        #expect(meter.reading(now: 9000).rowsPerSecond == 0)
        meter.reset()
        #expect(meter.reading(now: 9000).rows == 0)
    }
}

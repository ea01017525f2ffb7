// The app without its screen: phases, addresses, names, the keychain, as iOS behaves.
import DIMCrypto
import DIMServer
import Foundation
import Testing

@testable import DIMPhone

@Suite struct LifecycleTests {
    @Test func theFirstPhaseCountsLikeAnyOther() {
        var lifecycle = Lifecycle()
        // an app that is active when it first hears of a phase: no change follows
        #expect(lifecycle.enter(.active) == .resume)
        // told again, by whichever of the system's ways
        #expect(lifecycle.enter(.active) == nil)
        #expect(lifecycle.enter(.inactive) == nil)
        #expect(lifecycle.enter(.active) == nil)
        #expect(lifecycle.enter(.inactive) == nil)
        #expect(lifecycle.enter(.background) == .pause)
        #expect(lifecycle.enter(.background) == nil)
        #expect(lifecycle.enter(.inactive) == nil)
        #expect(lifecycle.enter(.active) == .resume)
    }

    @Test func anAppThatStartsInTheBackgroundListensWhenItComesToTheFront() {
        var lifecycle = Lifecycle()
        #expect(lifecycle.enter(.background) == nil)
        #expect(lifecycle.enter(.inactive) == nil)
        #expect(lifecycle.enter(.active) == .resume)
    }
}

@Suite struct AddressTests {
    private let phone = [
        InterfaceAddress(interface: "lo0", address: "127.0.0.1"),
        InterfaceAddress(interface: "pdp_ip0", address: "10.11.12.13"),
        InterfaceAddress(interface: "utun3", address: "10.8.0.2"),
        InterfaceAddress(interface: "awdl0", address: "169.254.7.7"),
        InterfaceAddress(interface: "en2", address: "169.254.10.20"),
        InterfaceAddress(interface: "en0", address: "192.168.1.7"),
        InterfaceAddress(interface: "en1", address: "192.168.5.5", isUp: false),
        InterfaceAddress(interface: "bridge100", address: "172.20.10.1"),
    ]

    @Test func wiFiCablesAndTheHotspotAreShown() {
        #expect(reachable(phone) == ["192.168.1.7", "172.20.10.1", "169.254.10.20"])
        #expect(reachable([]).isEmpty)
    }

    @Test func thisMachinesInterfacesAreRead() {
        #expect(InterfaceAddress.all().contains { $0.address == "127.0.0.1" && $0.isUp })
    }

    @MainActor @Test func anotherNetworkIsAnnouncedAnewAndTheSameOneIsNot() {
        var log: [String] = []
        let announcer = Announcer(
            start: { log.append("start \($0.name) \($0.port) \($0.addresses)") }, stop: { log.append("stop") })
        announcer.announce(nil)
        #expect(log.isEmpty)
        let home = Announcement(name: "a phone", port: 7878, addresses: ["192.168.1.7"])
        announcer.announce(home)
        announcer.announce(home)
        #expect(log == ["start a phone 7878 [\"192.168.1.7\"]"])
        log = []
        var away = home
        away.addresses = ["172.20.10.1"]
        announcer.announce(away)
        #expect(log == ["stop", "start a phone 7878 [\"172.20.10.1\"]"])
        log = []
        away.name = "another"
        announcer.announce(away)
        announcer.announce(nil)
        announcer.announce(nil)
        #expect(log == ["stop", "start another 7878 [\"172.20.10.1\"]", "stop"])
    }
}

@Suite struct DeviceNameTests {
    @Test func twoPhonesOfOneHouseHaveTwoNames() {
        // what UIDevice.name says since iOS 16
        #expect(DeviceName.best(chosen: nil, system: "iPhone", machine: "iPhone14,2") == "iPhone 13 Pro")
        #expect(DeviceName.best(chosen: nil, system: "iPhone", machine: "iPhone15,4") == "iPhone 15")
        #expect(DeviceName.best(chosen: nil, system: "iPhone", machine: "iPhone99,9") == "iPhone (iPhone99,9)")
        #expect(DeviceName.best(chosen: nil, system: "iPad", machine: "iPad14,3") == "iPad (iPad14,3)")
        // an owner's name, where the system gives it or it was typed
        #expect(DeviceName.best(chosen: nil, system: "Ada's iPhone", machine: "iPhone14,2") == "Ada's iPhone")
        #expect(DeviceName.best(chosen: "kitchen", system: "iPhone", machine: "iPhone14,2") == "kitchen")
        #expect(DeviceName.best(chosen: "  \n", system: "iPhone", machine: "iPhone14,2") == "iPhone 13 Pro")
        // an iPad app on a Mac
        #expect(DeviceName.best(chosen: nil, system: "iPad", machine: "arm64") == "iPhone")
    }

    @Test func aNameFitsTheProtocol() {
        let long = DeviceName.cleaned(String(repeating: "ä", count: 100) + "\u{202E}\n")
        #expect(long.utf8.count == 64)
        #expect(!DeviceName.machine().isEmpty)
    }
}

/// A keychain that behaves as macOS's does: the secret of one item, or the attributes of all, never the secrets of all.
private final class Keychain: SecretStore, @unchecked Sendable {
    private let items = Locked<[(account: String, secret: [UInt8], label: String)]>([])
    var isLocked = false
    var isSilent = false

    func accounts() throws -> [String] {
        if isSilent { throw KeyStoreError("not now") }
        return items.withLock { $0.map(\.account) }
    }
    func secret(_ account: String) -> [UInt8]? {
        isLocked ? nil : items.withLock { $0.first { $0.account == account }?.secret }
    }
    func add(_ secret: [UInt8], account: String, label: String) throws {
        try items.withLock { items in
            guard !items.contains(where: { $0.account == account }) else { throw KeyStoreError("twice") }
            items.append((account, secret, label))
        }
    }
    var labels: [String] { items.withLock { $0.map(\.label) } }
}

@Suite struct SecretKeysTests {
    @Test func keysAreFetchedOneByOne() throws {
        let keychain = Keychain()
        let store = SecretKeys(keychain)
        #expect(store.keys().isEmpty)
        let keys = [PairKey.random(), PairKey.random()]
        for key in keys { try store.add(key, name: "a desk\u{202E}") }
        #expect(store.keys() == keys)
        #expect(keychain.labels.allSatisfy { !$0.contains("\u{202E}") })
        #expect(throws: KeyStoreError.self) { try store.add(keys[0], name: "again") }
        // before the first unlock there are items, and no secrets
        keychain.isLocked = true
        #expect(store.keys().isEmpty)
        #expect(try store.list() == KeyList([], unread: Set(keys.map(\.id))))
        keychain.isSilent = true
        #expect(throws: KeyStoreError.self) { try store.list() }
    }
}

// The keychain: on this device only, readable after the first unlock. One question asks for all items' attributes, another
// for one item's secret: both at once is refused on macOS.
import DIMPhone
import DIMServer
import Foundation
import Security

struct KeychainStore: SecretStore {
    private static let service = "dim.pair-keys"

    func accounts() throws -> [String] {
        let query: [CFString: Any] = [
            kSecClass: kSecClassGenericPassword, kSecAttrService: KeychainStore.service, kSecReturnAttributes: true,
            kSecMatchLimit: kSecMatchLimitAll,
        ]
        var result: CFTypeRef?
        let status = SecItemCopyMatching(query as CFDictionary, &result)
        if status == errSecItemNotFound { return [] }
        guard status == errSecSuccess, let items = result as? [[CFString: Any]] else {
            throw KeyStoreError("the keychain does not say which keys it has (\(status))")
        }
        return items.compactMap { $0[kSecAttrAccount] as? String }
    }

    func secret(_ account: String) -> [UInt8]? {
        let query: [CFString: Any] = [
            kSecClass: kSecClassGenericPassword, kSecAttrService: KeychainStore.service, kSecAttrAccount: account,
            kSecReturnData: true, kSecMatchLimit: kSecMatchLimitOne,
        ]
        var result: CFTypeRef?
        guard SecItemCopyMatching(query as CFDictionary, &result) == errSecSuccess, let data = result as? Data else {
            return nil
        }
        return [UInt8](data)
    }

    func add(_ secret: [UInt8], account: String, label: String) throws {
        let item: [CFString: Any] = [
            kSecClass: kSecClassGenericPassword, kSecAttrService: KeychainStore.service, kSecAttrAccount: account,
            kSecAttrLabel: label, kSecValueData: Data(secret),
            kSecAttrAccessible: kSecAttrAccessibleAfterFirstUnlockThisDeviceOnly,
        ]
        let status = SecItemAdd(item as CFDictionary, nil)
        guard status == errSecSuccess else { throw KeyStoreError("the keychain refused the key (\(status))") }
    }
}

<?php
// Publishes a message on a bus: publish("http://localhost/cgi-bin/chat", ["move" => "e4"]). It sends again what had no
// answer, and the message is published once. From a shell: php publish.php URL MESSAGE, with MESSAGE as JSON.

function publish(string $bus, mixed $data, int $tries = 5): int
{
    $once = bin2hex(random_bytes(16));
    $options = ['method' => 'POST', 'header' => 'Content-Type: application/json', 'timeout' => 10];
    $options += ['content' => json_encode($data, JSON_THROW_ON_ERROR), 'ignore_errors' => true];
    for ($try = 1; ; $try++) {
        $text = @file_get_contents("$bus?user=0&once=$once", false, stream_context_create(['http' => $options]));
        $reply = json_decode($text ?: '', true);
        if (isset($reply['id'])) {
            return $reply['id'];
        }
        $headers = $text === false ? [] : $http_response_header;
        $status = (int) (explode(' ', $headers[0] ?? '')[1] ?? 0);
        $code = $reply['error'] ?? '';
        $may_pass = $status === 0 || in_array($status, [408, 425, 429]) || $status >= 500 && $code !== 'bad_setting'
            || in_array($code, ['once_undecided', 'incomplete']);
        if (!$may_pass || $try === $tries) {
            throw new RuntimeException($reply['message'] ?? "The bus cannot be reached: status $status.");
        }
        $retry_after = preg_replace('/^Retry-After: *(\d+)$|.*/i', '$1', $headers);
        sleep(max($try, 0, ...array_map('intval', $retry_after)));
    }
}

if (PHP_SAPI === 'cli' && realpath($argv[0]) === __FILE__) {
    echo publish($argv[1], json_decode($argv[2], false, 512, JSON_THROW_ON_ERROR)), "\n";
}
